"""From a stored image to pixels, and from pixels to the picture that a plan describes. One way, for all callers.

`pixels` gives an image as it is stored: RGB, uint8, height x width x 3, not yet upright. `render` carries plans out
on such an array: crop, turn upright and mirror in one pass over the crop, resize, window. Both write to scratch
buffers of the thread or straight to their destination, a picture's slot in the batch.

The resize is torch's own uint8 kernel (antialiased bilinear, the one behind torchvision's tensors), which runs on
channels-last memory without the GIL: a third of Pillow's time for pixels within 1 level of it. It takes no offset,
so a window of a resized picture is cut from a resize that ends where the window ends (`geometry.trim`).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch

from . import jpeg, record
from .buffers import scratch
from .errors import DecodeError
from .geometry import MIRRORED, Box, Plan, stored_box, trim, upright_size
from .jpeg import Pixels

_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_LEFT_TO_PILLOW = (b"GIF8", b"II*\0", b"MM\0*")
_PILLOW_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
# As torch.nn.functional calls it, 3 us less than through torch.ops; its stub lacks the form with `out`.
_resize: Any = torch._C._nn._upsample_bilinear2d_aa


def pixels(field: record.Field, *, keep: bool = False) -> Pixels:
    """Decode a stored image: uint8 RGB (height, width, 3), as it is stored.

    keep: give an array of its own, not a scratch buffer that the thread's next image overwrites.

    Raises:
        DecodeError: the bytes are damaged, or are not the picture that the record describes.
    """
    shape = (field.height, field.width, 3)
    if field.codec == record.RAW:
        return _raw_pixels(field)
    if field.codec == record.ENCODED:
        return decode_other(field.payload, shape)
    nbytes = field.height * field.width * 3
    try:
        out = (np.empty(nbytes, np.uint8) if keep else scratch("decode", nbytes)).reshape(shape)
    except (MemoryError, ValueError) as error:
        raise DecodeError(f"there is no memory for {field.width} x {field.height} pixels") from error
    jpeg.decode(field.payload, out)
    return out


def _raw_pixels(field: record.Field) -> Pixels:
    expected = field.height * field.width * 3
    if field.channels != 3 or len(field.payload) != expected:
        raise DecodeError(
            f"raw image: {len(field.payload)} bytes and {field.channels} channels for {field.height} x {field.width} "
            f"pixels, where {expected} bytes of 3 channels belong"
        )
    return np.frombuffer(field.payload, np.uint8).reshape(field.height, field.width, 3)


def upright(field: record.Field) -> Pixels:
    """Decode a stored image whole and turn it upright: uint8 RGB (height, width, 3), an array of its own."""
    image = pixels(field, keep=True)
    if field.orientation == 1 and field.codec != record.RAW:
        return image
    out = np.empty((*upright_size(image.shape[:2], field.orientation), 3), np.uint8)
    _turn(image, field.orientation, out)
    return out


def decode_other(data: bytes | memoryview, shape: tuple[int, ...] | None = None) -> Pixels:
    """Decode any other format to uint8 RGB, orientation ignored: alpha dropped, 16 bits cut to 8, a GIF's first frame.

    Raises:
        DecodeError: it can't be decoded, or the picture is not of the `shape` that was expected.
    """
    image = _decode_by_pillow(data) if bytes(data[:4]) in _LEFT_TO_PILLOW else None
    if image is None:
        image = _decode_by_opencv(data)
    if shape is not None and image.shape != shape:
        raise DecodeError(f"it decodes to {image.shape[:2]} pixels, the record says {shape[:2]}")
    return image


def _decode_by_opencv(data: bytes | memoryview) -> Pixels:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_STORED)
    except cv2.error as error:
        raise DecodeError(f"OpenCV can't decode it: {error.err}") from error
    if image is None:
        raise DecodeError("OpenCV can't decode it: the bytes are damaged or of an unknown format")
    return image  # type: ignore[return-value]  # uint8, by the flags


def _decode_by_pillow(data: bytes | memoryview) -> Pixels | None:
    """What OpenCV shows differently: it paints a GIF's transparent pixels, and multiplies a TIFF's colours by alpha.

    None for kinds of TIFF (16 bits, say) that Pillow does not turn to RGB well.
    """
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("GIF", "TIFF")) as image:
            return np.array(image.convert("RGB")) if image.mode in _PILLOW_MODES else None
    except Exception as error:  # Pillow's parsers raise whatever a damaged file makes them stumble over
        raise DecodeError(f"damaged: {error}") from error


def render(image: Pixels, orientation: int, plans: list[Plan], out: Pixels) -> None:
    """Carry `plans` out on an image and write the picture to `out`.

    image: uint8 (height, width, 3) as stored. orientation: EXIF, 1 to 8, as stored. out: C-contiguous uint8 of the last
    plan's output size.
    """
    for plan in plans[:-1]:
        step = np.empty((*plan.output_size, 3), np.uint8)
        _render(image, orientation, plan, step)
        image, orientation = step, 1
    _render(image, orientation, plans[-1], out)


def _render(image: Pixels, orientation: int, plan: Plan, out: Pixels) -> None:
    turn = MIRRORED[orientation] if plan.mirror else orientation
    whole_rows = orientation == 1 and not plan.mirror and plan.box.width == image.shape[1]
    plan, scales = trim(plan)
    if whole_rows and plan.size[1] != image.shape[1]:
        # Contiguous rows need no copy, and with its scale given the kernel reads no further than the trimmed box.
        plan = plan._replace(box=plan.box._replace(width=image.shape[1]))
    box = stored_box(plan.box, orientation, upright_size(image.shape[:2], orientation))
    crop = image[box.y : box.y + box.height, box.x : box.x + box.width]
    if plan.window is None:
        if plan.resizes:
            _resize(_as_images(_upright(crop, turn)), plan.size, False, *scales, out=_as_images(out))
        else:
            _turn(crop, turn, out)
        return
    picture = _upright(crop, turn)
    if plan.resizes:
        resized = scratch("window", plan.size[0] * plan.size[1] * 3).reshape(*plan.size, 3)
        _resize(_as_images(picture), plan.size, False, *scales, out=_as_images(resized))
        picture = resized
    _cut(picture, plan.window, out)


def _cut(picture: Pixels, window: Box, out: Pixels) -> None:
    """Write a window of the picture to `out`, zeros where it reaches beyond."""
    height, width = picture.shape[:2]
    top, left = max(window.y, 0), max(window.x, 0)
    inside = picture[top : min(window.y + window.height, height), left : min(window.x + window.width, width)]
    if inside.shape != out.shape:
        out[...] = 0
    np.copyto(out[top - window.y :, left - window.x :][: inside.shape[0], : inside.shape[1]], inside)


def _upright(crop: Pixels, orientation: int) -> Pixels:
    """The crop turned upright, contiguous and writable, in a scratch buffer unless it is all that already."""
    if orientation == 1 and crop.flags.c_contiguous and crop.flags.writeable:
        return crop
    height, width = upright_size(crop.shape[:2], orientation)
    out = scratch("upright", height * width * 3).reshape(height, width, 3)
    _turn(crop, orientation, out)
    return out


def _turn(crop: Pixels, orientation: int, out: Pixels) -> None:
    """Write `crop`, stored with an EXIF orientation, upright to `out`, by OpenCV: NumPy takes 30 times as long."""
    if orientation == 1:
        np.copyto(out, crop)
    elif orientation <= 4:
        cv2.flip(crop, (1, -1, 0)[orientation - 2], out)
    elif orientation == 5:
        cv2.transpose(crop, out)
    elif orientation == 7:
        cv2.flip(cv2.transpose(crop), -1, out)
    else:
        cv2.rotate(crop, cv2.ROTATE_90_CLOCKWISE if orientation == 6 else cv2.ROTATE_90_COUNTERCLOCKWISE, out)


def _as_images(array: Pixels) -> torch.Tensor:
    """A (height, width, 3) array as a batch of one channels-last tensor, sharing its memory."""
    height, width, _ = array.shape
    return torch.from_numpy(array).as_strided((1, 3, height, width), (height * width * 3, 1, width * 3, 3))
