"""Reason codes: what became of an object, in words, and what its owner can do about it.

A code of status ``kept`` is a remark on an object or slice that is in the shards; so is any code
among `SliceRow.flags`, where the same finding is small enough to keep the slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from medpsp.dicom.labelcodes import LABEL_CODES
from medpsp.types import STATUSES, ScanRow, Status


class Code(NamedTuple):
    """Status of an object with this code, what it means, what to do: one short sentence each."""

    status: Status
    meaning: str
    action: str


_NO_DICOM = tuple(
    "NOT_DICOM NOT_REGULAR FILE_ FOLDER_ SYMLINK_ SAME_FILE ARCHIVE_ GZIP INFLATE_ SIZE_".split()
)
"""What codes begin with of objects that were not seen to be DICOM."""

UNKNOWN = Code("quarantined", "A code that this version does not know.", "Report it.")
"""What `code_of` gives for a code of no table; a test holds that no source raises one."""

# fmt: off
_IMAGE_CODES: dict[str, tuple[Status, str, str]] = {
    # files and archives
    "FILE_EMPTY": ("quarantined", "The file has no bytes.",
        "Copy it from its source again."),
    "FILE_TOO_SHORT": ("quarantined", "The file is too short to hold anything.",
        "Copy it from its source again."),
    "FILE_UNREADABLE": ("quarantined", "The file cannot be opened or read.",
        "Check permissions and the disk, then run again."),
    "SOURCE_CHANGED": ("quarantined", "The file changed after the archive was scanned.",
        "Run again: it is scanned anew."),
    "NOT_REGULAR": ("skipped", "A pipe, socket, device, or link to nowhere.",
        "Nothing."),
    "FOLDER_UNREADABLE": ("quarantined", "The folder cannot be listed; what is in it is not seen.",
        "Check permissions and the disk, then run again."),
    "SYMLINK_LOOP": ("skipped", "A link to itself, or to a folder around it.",
        "Nothing."),
    "SYMLINK_OUTSIDE": ("quarantined", "A link to a folder outside the archive, not followed.",
        "Move or copy the folder into the archive if it belongs there."),
    "SYMLINK_FOLDER": ("duplicate", "A link to a folder that is in the archive anyway.",
        "Nothing."),
    "SYMLINK_DUPLICATE": ("duplicate", "A link to a file that is in the archive anyway.",
        "Nothing."),
    "SAME_FILE": ("duplicate", "A further name of a file that is in the archive anyway.",
        "Nothing."),
    "NOT_DICOM": ("skipped", "No DICOM file.",
        "Nothing."),
    "DICOMDIR": ("skipped", "A directory of files.",
        "Nothing: the files themselves are read."),
    "GZIP": ("kept", "The file was packed with gzip.",
        "Nothing."),
    "GZIP_DAMAGED": ("quarantined", "The gzip file is damaged or cut short.",
        "Copy it from its source again."),
    "ARCHIVE_OPENED": ("skipped", "A zip or tar file; its members count one by one.",
        "Nothing."),
    "ARCHIVE_NESTED": ("quarantined", "An archive within an archive.",
        "Unpack the outer one."),
    "ARCHIVE_DAMAGED": ("quarantined", "The zip or tar file is damaged here or cut short.",
        "Copy it from its source again."),
    "ARCHIVE_ENCRYPTED": ("quarantined", "A member of a zip file is encrypted.",
        "Unpack it with its password."),
    "ARCHIVE_UNSUPPORTED": ("quarantined", "A kind of archive or packing that is not read.",
        "Unpack it, or pack it as zip or tar."),
    "INFLATE_LIMIT": ("quarantined", "It unpacks to absurdly many bytes.",
        "Unpack it yourself if it is no attack."),
    "SIZE_LIMIT": ("quarantined", "An absurd size, refused before memory is taken.",
        "Copy it from its source again; very large objects must be split."),
    # what kind of object
    "NOT_IMAGE": ("skipped", "A DICOM object without pixels: a report, a plan, a waveform.",
        "Nothing."),
    "MODALITY_SKIPPED": ("skipped", "The modality is not asked for.",
        "Add it to data.modalities."),
    "LOCALIZER": ("skipped", "A localizer.",
        "data.non_volumes=keep keeps it."),
    "SC_IMAGE": ("skipped", "A secondary capture: a photograph of a screen or of paper.",
        "data.non_volumes=keep keeps it."),
    "DOSE_REPORT": ("skipped", "A dose sheet.",
        "data.non_volumes=keep keeps it."),
    "PHI_BURNED_IN": ("quarantined", "The pixels may show a name.",
        "Look at them; BurnedInAnnotation=NO or data.burned_in lets them in."),
    "PHI_BLANKED": ("kept", "All but the regions of tissue is blanked; it might show names.",
        "Nothing."),
    "RECOGNIZABLE_FACE_POSSIBLE": ("kept", "A face could be rendered from the volume.",
        "Keep these shards as safe as the archive, or deface the volumes first."),
    "NOT_LISTED": ("skipped", "The image is in none of the split lists.",
        "List it."),
    "NAME_NO_PATIENT": ("quarantined", "The file name names no patient.",
        "See data.voc.patient_pattern."),
    # header
    "HDR_TRUNCATED": ("quarantined", "The file ends within its header.",
        "Copy it from its source again."),
    "HDR_DEPTH": ("quarantined", "Sequences are nested absurdly deep.",
        "Export it again."),
    "HDR_REQUIRED_MISSING": ("quarantined", "The header lacks what every image needs.",
        "Export it again."),
    "ELEM_INVALID": ("quarantined", "A header value that is needed is malformed.",
        "Export it again."),
    "NO_PREAMBLE": ("kept", "The file lacks the DICOM preamble.",
        "Nothing."),
    "NO_META": ("kept", "The file lacks the file meta group.",
        "Nothing."),
    "GUESSED_TS": ("kept", "The encoding of the file was found from its bytes.",
        "Nothing."),
    "TS_INVALID": ("kept", "The transfer syntax is no UID.",
        "Nothing: the encoding was found from the bytes."),
    "TS_MISSING": ("quarantined", "No transfer syntax, and the pixels do not show what they are.",
        "Export it again; on kept slices the encoding was found from the bytes."),
    "TS_MISMATCH": ("quarantined", "The pixels are not encoded as the transfer syntax says.",
        "Export it again."),
    "TS_UNSUPPORTED": ("quarantined", "No maintained decoder for this transfer syntax.",
        "Transcode it to a lossless one."),
    # pixels
    "PIX_TRUNCATED": ("quarantined", "The pixels are cut short.",
        "Copy it from its source again."),
    "PIX_UNLIKE_SERIES": ("quarantined", "Size or kind of the pixels changed since the scan.",
        "Run again while nothing else writes to the archive."),
    "DEC_ERROR": ("quarantined", "The decoder refused the pixels: they are damaged.",
        "Copy it from its source again."),
    "DEC_CRASH": ("quarantined", "The decoder crashed on it.",
        "Copy it from its source again, or transcode it."),
    "DEC_TIMEOUT": ("quarantined", "It took too long.",
        "Raise data.decode_seconds if it is a large object."),
    "DEC_OOM": ("quarantined", "It took too much memory.",
        "Raise data.decode_memory_mib if it is a large object."),
    "BITS_UNSUPPORTED": ("quarantined", "A depth of bits that is not read.",
        "Convert it to 8 or 16 bits."),
    "PHOTOMETRIC_UNSUPPORTED": ("quarantined", "A colour space that is not read.",
        "Convert it to grey, RGB or a palette."),
    "SIGN_MISMATCH": ("quarantined", "Codestream and header disagree on signed pixels.",
        "Transcode it to a lossless syntax with its vendor's tool."),
    "VALUE_RANGE": ("quarantined", "Pixels leave the range that the header promises.",
        "Export it again: rescaling or padding is wrong."),
    "RESCALE_ABSENT": ("kept", "CT without rescaling: its values may not be HU.",
        "Check the values; leave it out if they are not."),
    "RESCALE_NOT_HU": ("kept", "CT whose values are said to be in another unit than HU.",
        "Check the values; leave it out if they are not HU."),
    "VALUE_ROUNDED": ("kept", "Pixels of more than 24 bits; float32 rounds large values.",
        "Nothing, unless the last digits count."),
    "UID_MISSING": ("kept", "Series or image without its UID; geometry tells series apart.",
        "Export it again from the archive."),
    "PATIENT_ID_MISSING": ("kept", "No PatientID; its series or its study tells whose it is.",
        "Export it again from the archive."),
    "PATIENT_CONFLICT": ("quarantined", "Slices of one series name different patients.",
        "Find out whose it is and set PatientID in all of its files."),
    "VOI_LUT": ("kept", "The file is shown by a VOI LUT, which no window stands for.",
        "Nothing; the network is shown the configured window or percentiles."),
    "VOI_INVALID": ("kept", "The window of the file is unusable and ignored.",
        "Nothing."),
    "TILED": ("kept", "A tile of a whole-slide image.",
        "Nothing."),
    "IMAGE_UNREADABLE": ("quarantined", "The image cannot be decoded.",
        "Save it again."),
    "MULTIFRAME_UNSUPPORTED": ("quarantined", "The image file holds several images.",
        "Save each as a file of its own."),
    "COLOUR_FOR_GREY_MODEL": ("skipped", "A colour image for a model of grey images.",
        "Train with model.in_channels 3."),
    "INPUT_FOR_MODEL": ("skipped", "Values or a window that the graph of the model does not take.",
        "Use a model that was trained on such images."),
    "NIFTI_UNREADABLE": ("quarantined", "The NIfTI file is not one readable grey volume.",
        "Save it again."),
    "NIFTI_UNPLACED": ("quarantined", "Neither qform nor sform says how the volume lies.",
        "Convert the DICOM files again, or set the form if you know it."),
    "SEG_NOT_WRITTEN": ("kept", "No SEG: headers lack what it needs, or the input is a NIfTI.",
        "Send the original images for a SEG."),
    "SEG_NOT_SENT": ("kept", "The archive that answers go to did not take the SEG; it stays here.",
        "See that the archive answers: it is tried again, and at the next start."),
    "MESH_NOT_WRITTEN": ("kept", "No mesh: images without geometry, or a GLB above 4 GiB.",
        "Send the original series; the STL of a large surface is there."),
    # geometry
    "GEOM_MISSING": ("kept", "CT or MR without a position: single images, no volume.",
        "Send the original series."),
    "GEOM_NONFINITE": ("quarantined", "A number of the geometry is infinite or absurd.",
        "Export it again."),
    "GEOM_BAD_IOP": ("quarantined", "Row and column directions are not at right angles.",
        "Export it again."),
    "GEOM_BAD_SPACING": ("quarantined", "The pixel spacing is not above zero.",
        "Export it again."),
    "SPACING_DETECTOR": ("kept", "Pixel spacing at the detector, larger than in the patient.",
        "Do not measure in these images."),
    "SINGLE_SLICE": ("kept", "One slice alone; its distance to the next is not known.",
        "Nothing, unless the rest of the series is missing."),
    "GANTRY_TILT": ("kept", "The slices are sheared against their normal; the affine is too.",
        "Nothing."),
    "MISSING_SLICES": ("quarantined", "The series has a hole of whole slices.",
        "Send the missing slices; kept slices lie beside the hole (data.gaps)."),
    "UNEVEN_SPACING": ("quarantined", "The distance between slices changes.",
        "Check the series; kept slices lie beside the change (data.gaps)."),
    "MIXED_CONTRAST": ("kept", "Echo, b-value, kernel or tube voltage changes in the volume.",
        "Check the series; leave it out if it is no volume."),
    "BY_TIME": ("kept", "Only the time tells images of one position apart.",
        "Check that each of these series shows one moment."),
    # duplicates
    "DUP_IDENTICAL": ("duplicate", "The same image again.",
        "Nothing."),
    "DUP_CONFLICT": ("quarantined", "Different images with one SOPInstanceUID.",
        "Find out which is right and take the others out."),
    "DUP_POSITION": ("quarantined", "Different images at one position of one series.",
        "Send the missing header values (echo, time, b-value), or take copies out."),
}
# fmt: on
CODES: dict[str, Code] = {
    code: Code(*row) for code, row in sorted({**_IMAGE_CODES, **LABEL_CODES}.items())
}
"""Every code that any object or slice can have."""


def code_of(code: str) -> Code:
    """What a code means; `UNKNOWN` for one of another version."""
    return CODES.get(code, UNKNOWN)


def is_no_dicom(code: str) -> bool:
    """Whether it is of an object that was not seen to be DICOM."""
    return code.startswith(_NO_DICOM)


def refusal(file_id: str, code: str, detail: str, frame: int = -1) -> ScanRow:
    """The row of an object, or of one frame, that is not kept; never of status ``kept``."""
    known = code_of(code).status
    status: Status = "quarantined" if known == "kept" else known
    return ScanRow(file_id=file_id, status=status, code=code, detail=detail, frame=frame)


def codes_markdown() -> str:
    """The page ``docs/codes.md``."""
    lines = [
        "# Reason codes",
        "",
        "What became of an object that is not in the shards as it is, and what to do about it.",
        "A code of status *kept* is a remark; any code may be one where the slice is kept.",
        "",
        "| code | status | meaning | what to do |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {c.status} | {c.meaning} | {c.action} |" for name, c in CODES.items()]
    return "\n".join(lines) + "\n"


def told_codes(counts: Mapping[str, int]) -> str:
    """For a message: ``1 DEC_OOM, 2 FILE_EMPTY``."""
    return ", ".join(f"{n} {code}" for code, n in sorted(counts.items()))


def told_statuses(codes: Mapping[str, int]) -> list[str]:
    """Lines for people: ``quarantined: 2 FILE_EMPTY``, in the order of `STATUSES`."""
    found: dict[str, dict[str, int]] = {status: {} for status in STATUSES}
    for code, count in codes.items():
        found[code_of(code).status][code] = count
    return [f"{status}: {told_codes(of)}" for status, of in found.items() if of]


def told_series(rows: Iterable[ScanRow]) -> Iterator[str]:
    """What is to be said of series, by their names in the answers: one line a code and series."""
    told: dict[tuple[str, str], str] = {}
    for row in rows:
        name, _, _ = row.detail.partition(":")
        if name.startswith("series-"):
            told.setdefault((row.code, name), f"{row.code}: {row.detail}")
    yield from told.values()


def told_rows(rows: Iterable[ScanRow]) -> str:
    """What was not segmented and why, then remarks on what was; empty where there is nothing."""
    words: dict[str, Counter[str]] = {"not segmented": Counter(), "remarks": Counter()}
    for row in rows:
        remark = row.status == "kept" or row.code == "ARCHIVE_OPENED"  # its members have their own
        words["remarks" if remark else "not segmented"][row.code] += 1
    return "; ".join(f"{say}: {told_codes(codes)}" for say, codes in words.items() if codes)
