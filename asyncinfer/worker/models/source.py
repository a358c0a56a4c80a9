"""The folder or file that a worker serves; read without ONNX Runtime, which `serve` lacks."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import Struct

from asyncinfer.errors import ModelDirUnreadable, StartError
from asyncinfer.models.folder import FolderListing, ModelFile, read_folder, single_file_model
from asyncinfer.untrusted import file_access


class ModelSource(Struct, frozen=True):
    """The folder of models that is served, or one file instead."""

    model_dir: Path
    wanted: tuple[str, ...] = ()
    """The names in MODELS; empty: all models are served."""
    model_file: Path | None = None
    """Only this file is served, and `model_dir` is not read."""

    @property
    def watched_folder(self) -> Path:
        """The folder to watch for changes."""
        return self.model_file.parent if self.model_file else self.model_dir

    @property
    def path(self) -> Path:
        """The folder that is served, or the one file, as an absolute path."""
        return (self.model_file or self.model_dir).absolute()

    @property
    def serves_all_models(self) -> bool:
        """Whether all models of the folder are served, as neither MODELS nor MODEL is set."""
        return not (self.wanted or self.model_file)

    def files(self) -> list[ModelFile]:
        """Reads the folder as `listing` does, and returns the files alone; raises
        ModelDirUnreadable."""
        return self.listing().files

    def listing(self) -> FolderListing:
        """Reads the folder; models that MODELS does not name are left out. Raises
        ModelDirUnreadable."""
        if self.model_file:
            is_there = os.path.lexists(self.model_file)
            return FolderListing([single_file_model(self.model_file)] if is_there else [])
        try:
            found = read_folder(self.model_dir)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not self.wanted:
            return found
        return FolderListing([file for file in found.files if file.model in self.wanted])

    def files_at_start(self) -> Sequence[ModelFile]:
        """As `listing_at_start`, the files alone."""
        return self.listing_at_start().files

    def listing_at_start(self) -> FolderListing:
        """As `listing`, for the start of a process: raises StartError if the settings can give no
        model, since the folder cannot be read or has none of the models that MODELS names. An empty
        folder is accepted without MODELS, as models may still come."""
        found = self.listing()
        missing = self.missing_models({file.model for file in found.files})
        if missing and len(missing) == len({*self.wanted}):
            raise StartError(
                f"MODELS names {', '.join(missing)}, and {self.path} has no such model. Correct "
                "MODELS, or set MODEL_DIR to the folder that has them."
            )
        return found

    def missing_models(self, found: Collection[str]) -> list[str]:
        """The names in MODELS that are not among `found`, the names of the models in the folder;
        sorted, and empty without MODELS."""
        return sorted({*self.wanted}.difference(found))


def _unreadable(model_dir: Path, error: OSError) -> ModelDirUnreadable:
    """Makes the error, with what to do about it."""
    remedy = "Set MODEL_DIR to a folder that can be read."
    if isinstance(error, NotADirectoryError):
        remedy = f"It is a file. To serve it alone: --model {model_dir}"
    return ModelDirUnreadable(
        f"MODEL_DIR {model_dir} {file_access.os_error_reason(error)}. {remedy}"
    )
