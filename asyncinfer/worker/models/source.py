"""Where a worker's models are: reads the folder, without ONNX Runtime, which `serve` lacks."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import Struct

from asyncinfer.errors import ModelDirUnreadable, StartError
from asyncinfer.models.folder import Listing, ModelFile, bare_file, read_folder
from asyncinfer.untrusted import file_access


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
        """Raises ModelDirUnreadable."""
        return self.listing().files

    def listing(self) -> Listing:
        """Raises ModelDirUnreadable."""
        if self.model_file:
            is_there = os.path.lexists(self.model_file)
            return Listing([bare_file(self.model_file)] if is_there else [])
        try:
            found = read_folder(self.model_dir)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not self.wanted:
            return found
        return Listing([file for file in found.files if file.model in self.wanted])

    def files_at_start(self) -> Sequence[ModelFile]:
        return self.at_start().files

    def at_start(self) -> Listing:
        """Raises StartError where the settings can never give a model: the folder cannot be read,
        or has none of those that MODELS names. An empty folder may still be filled."""
        found = self.listing()
        missing = self.missing({file.model for file in found.files})
        if missing and len(missing) == len({*self.wanted}):
            raise StartError(
                f"MODELS names {', '.join(missing)}, and {self.path} has no such model. Correct "
                "MODELS, or set MODEL_DIR to the folder that has them."
            )
        return found

    def missing(self, found: Collection[str]) -> list[str]:
        """Names in MODELS of which the folder has no model."""
        return sorted({*self.wanted}.difference(found))


def _unreadable(model_dir: Path, error: OSError) -> ModelDirUnreadable:
    mend = "Set MODEL_DIR to a folder that can be read."
    if isinstance(error, NotADirectoryError):
        mend = f"It is a file. To serve it alone: --model {model_dir}"
    return ModelDirUnreadable(f"MODEL_DIR {model_dir} {file_access.why(error)}. {mend}")
