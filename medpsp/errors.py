"""The error tree.

Each error is also the matching builtin. A message names what failed, where, what was found
against what was expected, and what to do. No message carries a patient's name, id or date:
objects of an archive are named by their pseudonymous ``file_id``.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: run the same command again."""
EXIT_CONFIG = 2
"""The configuration is wrong, and will be the next time."""


class MedpspError(Exception):
    """Base of every error a user of medpsp is meant to read."""


class ConfigError(MedpspError, ValueError):
    """The configuration or a command-line value is wrong; the command line exits with 2."""


class SourceError(MedpspError, ValueError):
    """One source object (file, series, mask) cannot be used; becomes a row of the reject table.

    Args:
        code: Reason code in capitals, for example ``PIX_TRUNCATED``.
        detail: Numbers and tag names only, never element values that may hold text.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)  # both, so that it survives pickling between processes
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class DicomError(SourceError):
    """A DICOM object cannot be read."""


class OtherModality(DicomError):
    """An image of a modality that is not asked for.

    Args:
        code, detail: As of any.
        series_uid, sop_uid: Its real UIDs, for memory and the catalogue: labels may name them.
    """

    def __init__(self, code: str, detail: str, series_uid: str = "", sop_uid: str = "") -> None:
        super().__init__(code, detail)
        self.args = code, detail, series_uid, sop_uid
        self.series_uid = series_uid
        self.sop_uid = sop_uid


class GeometryError(SourceError):
    """A series has no usable geometry."""


class LabelError(SourceError):
    """A mask cannot be placed on its image."""


def source_error(kind: str, values: Sequence[str]) -> SourceError:
    """The error of a child process, from the name of its class and its ``args``."""
    if kind == OtherModality.__name__:
        return OtherModality(*values[:4])
    known = {each.__name__: each for each in (GeometryError, LabelError)}.get(kind, DicomError)
    return known(*values[:2])


class ArchiveError(MedpspError, FileNotFoundError):
    """The archive is missing, empty, or yields nothing to train on."""


class NoArchive(ArchiveError, ConfigError):
    """There is no such folder or file; the command line exits with 2."""


class ShardError(MedpspError, RuntimeError):
    """Shards or their manifest are missing, incomplete or damaged."""


class Unreachable(ShardError):
    """A shard must be made anew, and slices that it holds cannot be read now."""


class TrainError(MedpspError, RuntimeError):
    """Training cannot start or go on."""


class NonFiniteLossError(TrainError):
    """The loss became NaN or infinite.

    Args:
        message: For the user.
        own: Whether what this rank computed was; else another one knows why.
    """

    def __init__(self, message: str, own: bool = True) -> None:
        super().__init__(message)
        self.own = own


class CheckpointError(TrainError):
    """No checkpoint verifies, or it belongs to another model."""


class Interrupted(MedpspError, InterruptedError):
    """Training was asked to end, and saved; the command line exits with `EXIT_AGAIN`."""


class ExportError(MedpspError, RuntimeError):
    """The ONNX file cannot be made."""


class ParityError(ExportError):
    """The ONNX file does not compute what the trained network computes."""


class ModelFileError(MedpspError, ValueError):
    """The ONNX file given to `predict` is not one that medpsp wrote."""


class NoModelFile(ModelFileError, ConfigError):
    """There is no such file; the command line exits with 2."""


class LaunchError(MedpspError, RuntimeError):
    """A job of the chain failed or could not be started."""
