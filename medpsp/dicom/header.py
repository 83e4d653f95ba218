"""What the image path asks of a header, whoever read it: pydicom, or `flat`."""

from __future__ import annotations

from typing import Any, Protocol


class Header(Protocol):
    """Elements by keyword; pydicom's `Dataset` is one."""

    @property
    def file_meta(self) -> Any:
        """The elements of group 0002, likewise."""

    def get(self, key: str, default: Any = None, /) -> Any:
        """The value of an element, or ``default`` where it is absent."""

    def __contains__(self, key: str, /) -> bool: ...

    def __getattr__(self, name: str, /) -> Any: ...
