"""Where a worker's models are: reads the folder, without ONNX Runtime, which `serve` lacks."""

from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import Struct

from asyncinfer import models
from asyncinfer.errors import StartError
from asyncinfer.models import ModelFile


class Source(Struct, frozen=True):
    """Where the models are."""

    model_dir: Path
    wanted: tuple[str, ...] = ()
    """Names; none means all."""
    model_file: Path | None = None
    """This one file, and nothing of the folder."""

    @property
    def watched(self) -> Path:
        return self.model_file.parent if self.model_file else self.model_dir

    @property
    def path(self) -> Path:
        """The folder that is served, or the one file; absolute."""
        return (self.model_file or self.model_dir).absolute()

    def files(self) -> list[ModelFile]:
        """Raises OSError when the folder cannot be read."""
        if self.model_file:
            return [models.bare_file(self.model_file)] if self.model_file.is_file() else []
        files = models.scan(self.model_dir)
        return [file for file in files if not self.wanted or file.model in self.wanted]

    def files_at_start(self) -> Sequence[ModelFile]:
        """Raises StartError where the settings can never give a model: the folder cannot be read,
        or has none of those that MODELS names. An empty folder may still be filled."""
        try:
            files = self.files()
        except OSError as error:
            raise StartError(
                f"MODEL_DIR {self.path} cannot be read: {error.strerror or error}. Let this user "
                "read it, or set MODEL_DIR to another folder."
            ) from error
        missing = self.missing({file.model for file in files})
        if missing and len(missing) == len({*self.wanted}):
            raise StartError(
                f"MODELS names {', '.join(missing)}, and {self.path} has no such model. Correct "
                "MODELS, or set MODEL_DIR to the folder that has them."
            )
        return files

    def missing(self, found: Collection[str]) -> list[str]:
        """Names in MODELS of which the folder has no model."""
        return sorted({*self.wanted}.difference(found))
