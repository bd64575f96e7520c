"""Image files of every kind, and files that only look like one: pixels as a viewer would show them, or a 4xx."""

import io
import random
import struct
import zlib
from math import ceil

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from defense.model_config import InputConfig
from defense.preprocessing import to_pixels
from service.errors import ServiceError
from service.images import decode_image

# pytest puts filters of its own in place of those that service.images sets; test_http.py sees the real ones at work.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MAX_PIXELS = 50_000_000
RED = (200, 100, 50)


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def plain(mode, color, size=(8, 8)):
    return Image.new(mode, size, color)


def decode(data, channels=3, size=(8, 8), max_pixels=MAX_PIXELS):
    return decode_image(data, InputConfig(size=size, channels=channels), max_pixels=max_pixels)


def refusal(data, **options):
    """The error that a file is refused with: always one with a 4xx status and a sentence."""
    with pytest.raises(ServiceError) as caught:
        decode(data, **options)
    assert 400 <= caught.value.status < 500 and len(str(caught.value)) > 20
    return caught.value


def decode_or_refuse(data, **options):
    try:
        pixels = decode(data, **options)
    except ServiceError as error:
        assert 400 <= error.status < 500
    else:
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8


def gradient(width, height):
    """Smooth, and different everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], 2).astype(np.uint8))


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, *, bits=8, color=0, extra=b""):
    """A PNG by hand: color 0 is gray, 2 RGB, 3 palette."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(width, height, pages=1, in_tiles=False):
    """An uncompressed 8-bit gray TIFF by hand: directories one after the other, all of the same 64 bytes."""
    place = ((322, 46_000), (323, 46_000), (324, 0), (325, 64)) if in_tiles else ((273, 0), (279, 64))
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), *place)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    length = len(directory) + 4
    offsets = [8 + page * length for page in range(1, pages)] + [0]
    return b"II*\0\x08\0\0\0" + b"".join(directory + struct.pack("<I", after) for after in offsets)


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif(width, height):
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame


def jpeg(width, height):
    data = encode(plain("L", 0), "JPEG")
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


def sixteen_bit_gray(value):
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def palette(color, transparency=None):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *color])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def phone_photo():
    """An MPO: a JPEG with a preview of itself behind it."""
    return encode(plain("RGB", RED), "MPO", save_all=True, append_images=[plain("RGB", (0, 0, 255), (4, 4))])


# file, the color a viewer shows on white paper, tolerance (lossy formats)
PICTURES = {
    "gray PNG": (encode(plain("L", 100), "PNG"), (100, 100, 100), 0),
    "RGB PNG": (encode(plain("RGB", RED), "PNG"), RED, 0),
    "16-bit RGB PNG": (png(8, 8, (b"\0" + b"\xc8\x00\x64\x00\x32\x00" * 8) * 8, bits=16, color=2), RED, 0),
    "RGB PNG with a transparent color": (encode(plain("RGB", RED), "PNG", transparency=RED), (255, 255, 255), 0),
    "gray PNG with a transparent level": (encode(plain("L", 9), "PNG", transparency=9), (255, 255, 255), 0),
    "opaque RGBA PNG": (encode(plain("RGBA", (*RED, 255)), "PNG"), RED, 0),
    "half transparent RGBA PNG": (encode(plain("RGBA", (*RED, 128)), "PNG"), (227, 177, 152), 1),
    "transparent RGBA PNG": (encode(plain("RGBA", (*RED, 0)), "PNG"), (255, 255, 255), 0),
    "half transparent LA PNG": (encode(plain("LA", (0, 128)), "PNG"), (127, 127, 127), 1),
    "transparent LA PNG": (encode(plain("LA", (0, 0)), "PNG"), (255, 255, 255), 0),
    "palette PNG": (encode(palette(RED), "PNG"), RED, 0),
    "palette PNG with a transparent entry": (encode(palette(RED, 1), "PNG"), (255, 255, 255), 0),
    "palette PNG with a half transparent entry": (encode(palette(RED, b"\xff\x80"), "PNG"), (227, 177, 152), 1),
    "white 1-bit PNG": (encode(plain("1", 1), "PNG"), (255, 255, 255), 0),
    "black 1-bit PNG": (encode(plain("1", 0), "PNG"), (0, 0, 0), 0),
    "1-bit TIFF of a fax": (encode(plain("1", 1), "TIFF", compression="group4"), (255, 255, 255), 0),
    "black 16-bit gray PNG": (encode(sixteen_bit_gray(0), "PNG"), (0, 0, 0), 0),
    "16-bit gray PNG": (encode(sixteen_bit_gray(32768), "PNG"), (128, 128, 128), 0),
    "white 16-bit gray PNG": (encode(sixteen_bit_gray(65535), "PNG"), (255, 255, 255), 0),
    "16-bit gray TIFF": (encode(sixteen_bit_gray(32768), "TIFF"), (128, 128, 128), 0),
    "JPEG": (encode(plain("RGB", RED), "JPEG", quality=95), RED, 3),
    "gray JPEG": (encode(plain("L", 100), "JPEG", quality=95), (100, 100, 100), 1),
    "progressive JPEG": (encode(plain("RGB", RED), "JPEG", quality=95, progressive=True), RED, 3),
    "CMYK JPEG": (encode(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0), 4),
    "MPO of a phone": (phone_photo(), RED, 6),
    "lossy WebP": (encode(plain("RGB", RED), "WEBP", quality=95), RED, 6),
    "lossless WebP": (encode(plain("RGB", RED), "WEBP", lossless=True), RED, 0),
    "transparent WebP": (encode(plain("RGBA", (*RED, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
    "BMP": (encode(plain("RGB", RED), "BMP"), RED, 0),
    "palette BMP": (encode(palette(RED), "BMP"), RED, 0),
    "TIFF": (encode(plain("RGB", RED), "TIFF"), RED, 0),
    "LZW TIFF": (encode(plain("RGB", RED), "TIFF", compression="tiff_lzw"), RED, 0),
    "deflate TIFF": (encode(plain("RGB", RED), "TIFF", compression="tiff_adobe_deflate"), RED, 0),
    "JPEG TIFF": (encode(plain("RGB", RED), "TIFF", compression="jpeg", quality=95), RED, 4),
    "CMYK TIFF": (encode(plain("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), 1),
    "transparent TIFF": (encode(plain("RGBA", (*RED, 0)), "TIFF"), (255, 255, 255), 0),
    "GIF": (encode(plain("RGB", RED).quantize(2), "GIF"), RED, 0),
    "transparent GIF": (encode(palette(RED), "GIF", transparency=1), (255, 255, 255), 0),
}
# Something to compress, so that there is something to damage.
DAMAGEABLE = {
    "PNG": encode(gradient(60, 60), "PNG"),
    "palette PNG": encode(gradient(60, 60).quantize(64), "PNG"),
    "16-bit PNG": encode(sixteen_bit_gray(1000).resize((60, 60)), "PNG"),
    "JPEG": encode(gradient(60, 60), "JPEG", exif=exif_of(orientation=6)),
    "progressive JPEG": encode(gradient(60, 60), "JPEG", progressive=True),
    "CMYK JPEG": encode(gradient(60, 60).convert("CMYK"), "JPEG"),
    "MPO": encode(gradient(60, 60), "MPO", save_all=True, append_images=[gradient(8, 8)]),
    "WebP": encode(gradient(60, 60), "WEBP"),
    "lossless WebP": encode(gradient(60, 60).convert("RGBA"), "WEBP", lossless=True),
    "GIF": encode(gradient(60, 60), "GIF"),
    "BMP": encode(gradient(60, 60), "BMP"),
    "TIFF": encode(gradient(60, 60), "TIFF"),
    "LZW TIFF": encode(gradient(60, 60), "TIFF", compression="tiff_lzw"),
    "deflate TIFF": encode(gradient(60, 60), "TIFF", compression="tiff_adobe_deflate"),
    "JPEG TIFF": encode(gradient(60, 60), "TIFF", compression="jpeg"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_the_colors_that_a_viewer_shows(name):
    data, color, tolerance = PICTURES[name]

    np.testing.assert_allclose(decode(data).astype(int), np.broadcast_to(color, (8, 8, 3)), atol=tolerance)


@pytest.mark.parametrize("name", ["RGB PNG", "palette PNG", "JPEG", "BMP", "opaque RGBA PNG"])
def test_a_gray_network_gets_the_luma_of_a_color_picture(name):
    data, _, tolerance = PICTURES[name]

    np.testing.assert_allclose(decode(data, channels=1).astype(int), np.full((8, 8, 1), 124), atol=tolerance)


STORED = {  # EXIF orientation -> how the upright picture lies in the file (EXIF 2.32, 4.6.4 A)
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.T,
    6: lambda upright: upright[:, ::-1].T,
    7: lambda upright: upright[::-1, ::-1].T,
    8: lambda upright: upright[::-1].T,
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_is_turned_upright(file_format, orientation):
    upright = np.arange(0, 256, 32, np.uint8).reshape(4, 2).repeat(8, 0).repeat(8, 1)
    exif = exif_of(orientation)
    options = {"quality": 100} | ({"lossless": True} if file_format == "WEBP" else {})
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))

    pixels = decode(encode(stored, file_format, exif=exif, **options), channels=1, size=(32, 16))

    np.testing.assert_allclose(pixels[:, :, 0].astype(int), upright, atol=3)


def test_a_picture_with_an_unknown_orientation_stays_as_it_is():
    assert decode(encode(plain("RGB", RED), "PNG", exif=exif_of(orientation=99)))[0, 0].tolist() == list(RED)


def test_huge_exif_data_is_no_obstacle():
    exif = exif_of(orientation=6)
    exif[ExifTags.Base.ImageDescription] = "x" * 60_000

    assert decode(encode(gradient(8, 8), "JPEG", exif=exif)).shape == (8, 8, 3)
    assert decode(encode(gradient(8, 8), "WEBP", exif=exif)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        random.Random(0).randbytes(5000),
        b"just a line of text\n" * 50,
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"<!DOCTYPE html><img src=x onerror=alert(1)>",
        b'{"images": []}',
        b"PK\x03\x04 a zip file called cat.png",
        b"MZ\x90\0 a program called cat.jpg",
        b"%PDF-1.7 a document called cat.gif",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_image_is_called_that(data):
    error = refusal(data)

    assert error.status == 400 and f"got {len(data)} other bytes" in str(error)


@pytest.mark.parametrize(
    "file_format", ["PPM", "ICO", "TGA", "EPS", "PDF", "JPEG2000", "AVIF", "PCX", "DDS", "ICNS", "SGI"]
)
def test_decoders_that_nobody_needs_stay_shut(file_format):
    assert refusal(encode(plain("RGB", RED, (16, 16)), file_format)).status == 400


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_truncated_file_is_refused(name):
    data = DAMAGEABLE[name]
    end = data.index(b"\xff\xd8", 1000) if name == "MPO" else len(data)  # its second picture may be missing

    for cut in (1, 2, 4, 8, 12, 16, 24, end // 8, end // 4, end // 2, end * 3 // 4, end - 40):
        assert refusal(data[:cut]).status == 400, f"{cut} of {end} bytes"


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_damaged_file_is_decoded_or_refused(name):
    dice = random.Random(name)
    for trial in range(200):
        data = bytearray(DAMAGEABLE[name])
        for _ in range(dice.choice((1, 2, 8, 64))):
            # Half of the blows hit the header, where they do most.
            data[dice.randrange(min(len(data), dice.choice((64, len(data)))))] = dice.randrange(256)
        try:
            decode_or_refuse(bytes(data), max_pixels=1_000_000)
        except BaseException:
            print(f"trial {trial} of {name}: {bytes(data).hex()}")
            raise


BOMBS = {
    "PNG of 2.5 gigapixels": png(50_000, 50_000, b"\0" * 100),
    "PNG between Pillow's limit and ours": png(10_000, 10_000, b"\0" * 100),
    "PNG that is all there, 400 megapixels in 50 kB": png(20_000, 20_000, bytes(20_000 * 2501), bits=1),
    "BMP": bmp(60_000, 60_000),
    "GIF": gif(65_535, 65_535),
    "JPEG": jpeg(65_000, 65_000),
    "TIFF": tiff(100_000, 100_000),
    "TIFF with a tile of 2 gigapixels": tiff(8, 8, in_tiles=True),
    "WebP": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (b"\xff\x3f\0" * 2) + b"VP8 \x04\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(name, monkeypatch):
    def explode(image):
        raise MemoryError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    error = refusal(BOMBS[name])

    assert error.status == 413 and "at most 50000000 pixels" in str(error)


def test_the_limit_itself_is_allowed():
    data = encode(plain("L", 0, (30, 40)), "PNG")

    assert decode(data, max_pixels=1200).shape == (8, 8, 3)
    assert refusal(data, max_pixels=1199).status == 413


@pytest.mark.parametrize("make", [bmp, gif, jpeg, tiff, lambda w, h: png(w, h, b"\0" * 100)])
@pytest.mark.parametrize("size", [(0, 0), (0, 8), (8, 0)])
def test_a_picture_without_pixels_is_refused(make, size):
    assert refusal(make(*size)).status == 400


def frames(*colors):
    first, *others = [plain("RGB", color) for color in colors]
    return first, {"save_all": True, "append_images": others}


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_refused(file_format):
    first, others = frames(RED, (0, 0, 255), (0, 255, 0))

    error = refusal(encode(first, file_format, **others))

    assert error.status == 422 and "still image" in str(error)


def test_the_pages_of_a_tiff_are_not_counted(monkeypatch):
    # Pillow counts them in a time that grows with the square of their number: hours for 30 MB.
    def count(image):
        raise RuntimeError("counted")

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(count))
    assert refusal(tiff(8, 8, pages=1000)).status == 422


def test_a_jpeg_of_very_many_scans_is_refused():
    # Each is a pass over all pixels: 20 ms of a 50 megapixel picture for 80 bytes.
    data = encode(gradient(60, 60), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]

    assert refusal(data[:-2] + 1000 * last_scan + data[-2:]).status == 422


def test_the_video_behind_a_motion_photo_is_no_scan():
    data = encode(gradient(60, 60), "JPEG")

    np.testing.assert_array_equal(decode(data + b"\xff\xda" * 1000), decode(data))


@pytest.mark.parametrize("pixel_type", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(pixel_type):
    error = refusal(encode(Image.fromarray(np.ones((8, 8), pixel_type)), "TIFF"))

    assert error.status == 422 and "convert the image" in str(error)


def test_a_giant_compressed_text_in_a_png_is_not_unpacked():
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))

    assert refusal(png(8, 8, (b"\0" + b"\x64" * 8) * 8, extra=text)).status == 400


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (3, 30_000)])
def test_a_strip_gives_its_center(file_format, size):
    strip = plain("L", 0, size)
    middle = (size[0] // 2, size[1] // 2)
    strip.paste(255, (max(0, middle[0] - 50), max(0, middle[1] - 50), middle[0] + 50, middle[1] + 50))

    assert decode(encode(strip, file_format)).min() == 255


@pytest.mark.parametrize("size", [(1, 40_000_000), (40_000_000, 1)])
@pytest.mark.parametrize("config", [InputConfig(size=(28, 28)), InputConfig(size=(28, 28), resize=256)])
def test_an_extreme_strip_is_never_enlarged_as_a_whole(size, config, monkeypatch):
    resize = Image.Image.resize

    def small(image, target, *arguments, **options):
        assert target[0] * target[1] < 5_000_000, f"{target} pixels would not fit in memory"
        return resize(image, target, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", small)
    assert to_pixels(plain("L", 7, size), config).shape == (28, 28, 3)


@pytest.mark.parametrize("config", [InputConfig(size=(28, 28)), InputConfig(size=(20, 30), resize=32)])
@pytest.mark.parametrize("size", [(28, 28), (640, 480), (333, 777), (5, 7), (500, 40), (4, 400), (900, 3)])
def test_pixels_are_those_of_resizing_the_whole_and_cropping_the_center(size, config):
    image = gradient(*size)
    height, width = config.size
    scale = config.resize / min(size) if config.resize else max(width / size[0], height / size[1])
    resized = image.resize([ceil(side * scale - 1e-6) for side in size], Image.Resampling.BILINEAR)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2

    expected = np.asarray(resized.crop((left, top, left + width, top + height)))

    np.testing.assert_array_equal(to_pixels(image, config), expected)
