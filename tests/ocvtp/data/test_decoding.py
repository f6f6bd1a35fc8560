"""Images: decoded as they look, or refused with the reason; names never lead out of their folder."""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from ocvtp.data.decoding import BadImage, UnsafePath, check_image, open_image, safe_join
from ocvtp.data.scenes import make_scene
from ocvtp.errors import BadInput


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../canary.jpg",
        "a/../../canary.jpg",
        "a/../b.jpg",
        "/etc/passwd",
        "\\\\server\\share\\x.jpg",
        "C:\\x.jpg",
        "C:x.jpg",
        "..\\canary.jpg",
        "x\0.jpg",
        "",
        " ",
        ".",
        "./",
        "half \ud800.jpg",
    ],
)
def test_a_name_that_may_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePath):
        safe_join(tmp_path, name)


@pytest.mark.parametrize("name", ["a.jpg", "train 2017/ü'\";\n.jpg", "..a.jpg", "a..b/c.jpg", "-rf"])
def test_odd_names_within_the_folder_are_fine(tmp_path: Path, name: str) -> None:
    assert safe_join(tmp_path, name) == tmp_path.resolve() / name


def test_links_may_stay_in_the_folder_but_not_leave_it(tmp_path: Path) -> None:
    (tmp_path / "out.jpg").write_bytes(b"canary")
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.jpg").write_bytes(encode(noise()))
    (tmp_path / "root").symlink_to(real)  # the folder itself may be a link
    for name, target in {"in.jpg": "a.jpg", "out.jpg": "../out.jpg", "up": ".."}.items():
        (real / name).symlink_to(target)
    assert safe_join(tmp_path / "root", "in.jpg") == (real / "a.jpg").resolve()
    for name in ("out.jpg", "up/out.jpg"):
        with pytest.raises(UnsafePath, match="leads out of the image folder"):
            safe_join(tmp_path / "root", name)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_never_yields_other_pixels(kind: str) -> None:
    data = encode(noise(), kind)
    whole_HW3 = np.asarray(open_image(data))
    refused = 0
    for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
        try:
            cut_HW3 = np.asarray(open_image(data[: int(len(data) * share)]))
        except BadImage:
            refused += 1
        else:
            np.testing.assert_array_equal(cut_HW3, whole_HW3)
    assert refused >= 5


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_truncated_jpeg_is_refused_wherever_it_is_cut(options: dict[str, bool]) -> None:
    data = encode(noise(), "JPEG", **options)
    for end in range(0, len(data) - 4, 37):
        with pytest.raises(BadImage):
            open_image(data[:end])


def test_truncation_shows_even_where_another_package_told_pil_to_ignore_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms_eval does
    whole = encode(noise(), "JPEG")
    cut = whole[: int(len(whole) * 0.7)]
    Image.open(io.BytesIO(cut)).load()  # PIL would take it now

    def refused(_: int) -> bool:
        try:
            open_image(cut)
        except BadImage as error:
            return "truncated" in error.reason
        return False

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(refused, range(200)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # as it was


def bomb() -> bytes:
    """A PNG that says it has 10^10 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"GIF89a" + b"\0" * 20, "decoded|formats"),
        (b"hello, I am text", "not an image in one of the formats JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(noise(1, 10_000)), "1 x 10000 pixels: one side is over 100 times"),
        (encode(noise(500, 500)), "500 x 500 pixels, more than the 200000"),
        (bomb(), "pixels"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "no defined white"),
    ],
)
def test_what_is_no_sound_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(data, max_pixels=200_000, name="x.png")
    assert isinstance(caught.value, BadInput)
    assert "x.png" in str(caught.value)
    assert "x.png" not in caught.value.reason


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    cases = {
        "gone.jpg": "not there",
        ".": "regular file",
        "pipe.jpg": "regular file",
        "loop.jpg": "cannot be read",
        "x" * 5000: "cannot be read",
    }
    for name, reason in cases.items():
        caught: list[BaseException] = []

        def attempt(path: Path = tmp_path / name, caught: list[BaseException] = caught) -> None:
            try:
                open_image(path)
            except BadImage as error:
                caught.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(5)
        assert caught, f"{name} was not refused"
        assert reason in str(caught[0])


# --- what is decoded ------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied_once_and_only_once(tmp_path: Path) -> None:
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste("red", (0, 0, 10, 20))  # red on the left
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        (tmp_path / "x.png").write_bytes(encode(upright, exif=exif))
        image = open_image(tmp_path / "x.png")
        red_HW = np.asarray(image)[..., 0] > 128
        # Where the EXIF standard puts the stored left edge.
        edge = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
        strip = {
            "left": red_HW[:, :10],
            "right": red_HW[:, -10:],
            "top": red_HW[:10],
            "bottom": red_HW[-10:],
        }
        assert red_HW.shape == ((20, 40) if orientation < 5 else (40, 20))
        assert strip[edge[orientation]].all()
        assert red_HW.sum() == 200
        np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(image)), np.asarray(image))


def test_every_mode_becomes_the_rgb_it_looks_like() -> None:
    grey16_HW = np.array([[0, 257 * 7, 257 * 128, 65535]], np.uint16)
    decoded_HW3 = np.asarray(open_image(encode(Image.fromarray(grey16_HW))))
    np.testing.assert_array_equal(decoded_HW3, np.repeat([[[0], [7], [128], [255]]], 3, -1))

    half_clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half_clear.putpixel((1, 0), (0, 0, 0, 0))
    expected_HW3 = [[[255, 0, 0], [255, 255, 255]]]  # over white
    np.testing.assert_array_equal(np.asarray(open_image(encode(half_clear))), expected_HW3)
    palette = half_clear.quantize(4)
    np.testing.assert_array_equal(np.asarray(open_image(encode(palette))), expected_HW3)
    see_through = Image.new("L", (2, 1), 9)
    see_through.putpixel((1, 0), 50)
    tagged_HW3 = np.asarray(open_image(encode(see_through, transparency=50)))
    np.testing.assert_array_equal(tagged_HW3, [[[9] * 3, [255] * 3]])

    for mode in ("1", "L", "LA", "P", "RGB"):
        assert open_image(encode(noise().convert(mode))).mode == "RGB"
    cmyk_HW3 = np.asarray(open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")), int)
    assert np.abs(cmyk_HW3 - [255, 0, 0]).max() < 8  # magenta and yellow make red


def test_the_first_frame_of_an_animation_counts_and_no_metadata_stays() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    image = open_image(encode(red, "GIF", save_all=True, append_images=[blue], comment=b"hello"))
    assert image.getpixel((4, 4)) == (255, 0, 0)
    assert image.info == {}


def encodings() -> dict[str, bytes]:
    """One picture in every format, and as JPEG of every kind that cameras and scanners write."""
    image = Image.fromarray(make_scene(0, "train", 0).pixels_HW3)
    turned = Image.Exif()
    turned[274] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "baseline": (image, "JPEG", {}),
        "progressive": (image, "JPEG", {"progressive": True}),
        "grey": (image.convert("L"), "JPEG", {}),
        "cmyk": (image.convert("CMYK"), "JPEG", {}),
        "turned": (image, "JPEG", {"exif": turned}),
        "restarts": (image, "JPEG", {"restart_marker_blocks": 4}),
        "png": (image.convert("RGBA"), "PNG", {}),
        "palette": (image.quantize(16), "GIF", {}),
        "webp": (image, "WEBP", {}),
    }
    found = {}
    for name, (picture, kind, options) in kinds.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("kind", encodings())
def test_to_check_an_image_says_what_to_open_it_would(kind: str) -> None:
    """Also of one that is cut off anywhere, or that has any byte changed."""
    data = encodings()[kind]
    draws = np.random.default_rng(0)
    variants = [data, b"", *(data[: int(len(data) * share)] for share in np.linspace(0.02, 0.999, 25))]
    for place in draws.integers(0, len(data), 60):
        variants.append(data[:place] + bytes([data[place] ^ int(draws.integers(1, 256))]) + data[place + 1 :])

    def verdict(look: Any, one: bytes) -> str:
        try:
            look(one, name="x", max_pixels=20_000)
        except BadImage as error:
            return error.reason
        return "sound"

    expected = [verdict(open_image, one) for one in variants]
    assert [verdict(check_image, one) for one in variants] == expected
    assert expected[0] == "sound"
    assert len(set(expected)) > 2
