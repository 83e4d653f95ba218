"""Our end of a DICOM connection: what is accepted, and how answers are sent.

pynetdicom speaks the protocol (PS3.7, PS3.8); it is imported when it is needed.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from medpsp.dicom.codestream import CODECS
from medpsp.dicom.decode import NATIVE
from medpsp.errors import ConfigError

if TYPE_CHECKING:
    from pynetdicom.ae import ApplicationEntity
    from pynetdicom.events import Event

CONNECT_S, ANSWER_S = 10.0, 120.0
"""Seconds until a peer is given up that does not accept, and one that does not answer a SEG."""
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


class Reply(NamedTuple):
    """What became of a file that was to be sent.

    Attributes:
        why: It was not taken; empty where it was.
        reached: Whether an association was made: where not, others need not be tried now.
    """

    why: str
    reached: bool = True


def sending_entity(aet: str) -> ApplicationEntity:
    """Offers SEG. A peer that does not answer, or stops reading, is given up after a while."""
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, SegmentationStorage

    entity = entity_of(aet)
    entity.add_requested_context(
        SegmentationStorage, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    )
    entity.connection_timeout, entity.acse_timeout = CONNECT_S, CONNECT_S
    entity.dimse_timeout = ANSWER_S
    return entity


def send(path: Path, peer: Peer, entity: ApplicationEntity) -> Reply:
    """Send one SEG by C-STORE, in an association of its own: what it breaks is its own alone.

    Args:
        path: DICOM SEG.
        peer: Takes it.
        entity: Of `sending_entity`.
    """
    from pydicom.errors import InvalidDicomError
    from pynetdicom import evt
    from pynetdicom.status import code_to_category

    handlers: list[tuple[object, Callable[[Event], object]]] = [(evt.EVT_CONN_OPEN, _limit)]
    try:
        assoc = entity.associate(
            peer.host,
            peer.port,
            ae_title=peer.aet,
            evt_handlers=handlers,  # type: ignore[arg-type]
        )
    except OSError:
        return Reply("no such host", reached=False)
    if not assoc.is_established:
        told = "the association is rejected" if assoc.is_rejected else "no connection"
        return Reply(told, reached=False)
    try:
        status = assoc.send_c_store(path).get("Status")
    except (ValueError, RuntimeError):  # no context for SEG; no connection any more
        status = None
    except (OSError, AttributeError, InvalidDicomError):
        return Reply("the file cannot be read")
    finally:
        if assoc.is_established:
            assoc.release()
    if status is None:
        return Reply("no answer, or SEG is not taken")
    taken = code_to_category(status) in ("Success", "Warning")
    return Reply("" if taken else f"status {status:#06x}")


def _limit(event: Event) -> None:
    """A peer that stops reading must not hold a write for ever; pynetdicom would let it."""
    line = event.assoc.dul.socket
    if line and line.socket:
        line.socket.settimeout(ANSWER_S)


def hang_up(entity: ApplicationEntity) -> None:
    """Cut the lines of an entity, one that is still being connected included.

    Threads of pynetdicom would keep the process until their timeouts end.
    """
    from pynetdicom.dul import DULServiceProvider

    for thread in threading.enumerate():
        if isinstance(thread, DULServiceProvider) and thread.assoc.ae is entity:
            line = thread.socket.socket if thread.socket else None
            if line:
                with suppress(OSError):  # it is closed already
                    line.shutdown(socket.SHUT_RDWR)


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


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone; False for names."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
