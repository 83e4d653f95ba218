"""Our end of a DICOM connection: what is accepted, and how answers are sent.

pynetdicom speaks the protocol (PS3.7, PS3.8); it is imported when it is needed.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medpsp.dicom.codestream import CODECS
from medpsp.dicom.decode import NATIVE
from medpsp.errors import ConfigError

if TYPE_CHECKING:
    from pynetdicom.ae import ApplicationEntity

PAUSES = (1.0, 5.0, 15.0)
"""Seconds before the second try to send an answer, the third, and the last."""
CONNECT_S, ANSWER_S = 10.0, 120.0
"""Seconds until a peer that does not answer is given up."""
_RETIRED = {
    "1.2.840.10008.5.1.4.1.1.3": "UltrasoundMultiFrameImageStorageRetired",
    "1.2.840.10008.5.1.4.1.1.5": "NuclearMedicineImageStorageRetired",
    "1.2.840.10008.5.1.4.1.1.6": "UltrasoundImageStorageRetired",
    "1.2.840.10008.5.1.4.1.1.12.3": "XRayAngiographicBiPlaneImageStorage",
}
"""Archives still send them; pynetdicom does not know them."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Where answers go.

    Attributes:
        aet: Application entity title, 1 to 16 characters.
        host: Name or address.
        port: 1 to 65535.
    """

    aet: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Peer:
        """Of ``AET@host:port``; an IPv6 address stands in brackets.

        Raises:
            ConfigError: Not of that form.
        """
        found = re.fullmatch(r"([^@\\\s]{1,16})@(?:\[([^]\s]+)\]|([^:@\s]+)):([1-9]\d{0,4})", text)
        if not found or int(found[4]) > 65535:
            raise ConfigError(
                f"--answer {text}: expected AET@host:port, for example PACS@10.0.0.5:104"
            )
        return cls(aet=found[1], host=found[2] or found[3], port=int(found[4]))


def send(
    files: Sequence[Path], peer: Peer, aet: str, pauses: Sequence[float] = PAUSES
) -> tuple[list[Path], str]:
    """Send SEG files by C-STORE.

    Args:
        files: DICOM SEG.
        peer: Takes them.
        aet: Our title.
        pauses: Seconds before each further try.

    Returns:
        Those that were not taken, and why.
    """
    left, why = _send_once(files, peer, aet)
    for pause in pauses:
        if not left:
            break
        time.sleep(pause)
        left, why = _send_once(left, peer, aet)
    return left, why


def _send_once(files: Sequence[Path], peer: Peer, aet: str) -> tuple[list[Path], str]:
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, SegmentationStorage
    from pynetdicom.status import code_to_category

    entity = entity_of(aet)
    entity.add_requested_context(
        SegmentationStorage, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    )
    entity.connection_timeout, entity.dimse_timeout = CONNECT_S, ANSWER_S
    try:
        assoc = entity.associate(peer.host, peer.port, ae_title=peer.aet)
    except OSError:  # no such host
        return list(files), "no such host"
    if not assoc.is_established:
        return list(files), "the association is rejected" if assoc.is_rejected else "no connection"
    left, why = [], ""
    for path in files:
        try:
            status = assoc.send_c_store(path).get("Status")
        except (ValueError, RuntimeError):  # no context for SEG; no connection any more
            status = None
        if status is None or code_to_category(status) not in ("Success", "Warning"):
            left.append(path)
            why = "no answer, or SEG is not taken" if status is None else f"status {status:#06x}"
    if assoc.is_established:
        assoc.release()
    return left, why


def entity_of(aet: str) -> ApplicationEntity:
    """Ours, with nothing of pynetdicom's own in the log: it quotes what peers send."""
    try:
        from pynetdicom import AE, _config
    except ImportError:
        raise ConfigError(
            "receive: pynetdicom is missing; install it with: pip install 'medpsp[receive]'"
        ) from None
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    _config.LOG_HANDLER_LEVEL = "none"
    warnings.filterwarnings("ignore", module=r"pydicom|pynetdicom")
    try:
        return AE(ae_title=aet)
    except ValueError:
        raise ConfigError(
            f"--aet {aet}: expected 1 to 16 characters of ASCII without a backslash"
        ) from None


def take_images(entity: ApplicationEntity) -> None:
    """Accept Verification, and all images in the transfer syntaxes that we decode."""
    from pynetdicom import (
        AllStoragePresentationContexts,
        VerificationPresentationContexts,
        register_uid,
    )
    from pynetdicom.service_class import StorageServiceClass
    from pynetdicom.sop_class import uid_to_service_class

    for uid, keyword in _RETIRED.items():
        if uid_to_service_class(uid) is not StorageServiceClass:
            register_uid(uid, keyword, StorageServiceClass)
    kinds = [context.abstract_syntax for context in AllStoragePresentationContexts]
    images = [uid for uid in kinds if uid and "Image Storage" in uid.name]
    entity.supported_contexts = VerificationPresentationContexts
    for uid in (*images, *_RETIRED):
        entity.add_supported_context(uid, [*NATIVE, *CODECS])
