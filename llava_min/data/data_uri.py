"""Images inside a record as data URIs (RFC 2397), with the limits of image files."""

import base64
import binascii
from dataclasses import dataclass, field

from PIL import Image

from llava_min.checks.image_file import check_file_size, decode_image
from llava_min.errors import UserError, shorten


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of an image file, decoded from a data URI."""

    data: bytes = field(repr=False)
    name: str  # for messages

    def open(self, exif: bool = False) -> Image.Image:
        return decode_image(self.data, self.name, exif=exif)

    @property
    def uri(self) -> str:
        return "data:;base64," + base64.b64encode(self.data).decode()


def is_data_uri(text: object) -> bool:
    return isinstance(text, str) and text[:5].lower() == "data:"


def from_data_uri(uri: str, name: str) -> Encoded:
    """`data:image/png;base64,iVBO…` -> the image file, not yet decoded. Raises UserError if it is
    not base64, or too large.
    """
    head, _, data = uri.partition(",")
    if not head.lower().endswith(";base64"):
        raise UserError(
            f"{name}: {shorten(uri)} is a data URI without base64; expected data:image/png;base64,…"
        )
    check_file_size((len(data) - 4) * 3 / 4, name)  # four characters are three bytes
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as e:  # ValueError: characters beyond ASCII
        raise UserError(
            f"{name}: {shorten(uri)} is not whole base64 ({shorten(e, 80)}); encode it again"
        ) from None
    if not found:
        raise UserError(f"{name}: is empty (0 bytes); encode it again")
    return Encoded(found, name)
