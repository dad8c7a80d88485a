"""Pixels as a model sees them, against transformers' own image processors: equal, or as near as is said."""

import io
import struct
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import write_patterned_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, ImageFilter, ImageOps

from vlkit.data.images import decode as decoder
from vlkit.data.images.decode import decode_pixels, load_pixels, resize_to_spec
from vlkit.data.images.resize import resize_with_torch
from vlkit.data.images.spec import RESAMPLING, PixelSpec
from vlkit.errors import DataError

SIZE = 32
SQUASH, CROP = PixelSpec(SIZE), PixelSpec(SIZE, fit="crop", resize=SIZE)
MESSY = {
    "truncated": ("truncated.jpg", "does not decode"),
    "page": ("page.jpg", "an HTML page"),
    "pointer": ("pointer.png", "git lfs pull"),
    "empty": ("empty.jpg", "unknown format"),
    "bomb": ("bomb.png", "more pixels than is safe"),
    "gone": ("gone.jpg", "no such image"),
}


def published(file, spec):
    """What transformers makes of a picture, in Pillow: int64 [3, size, size], before it is scaled."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    square = {"height": spec.size, "width": spec.size}
    if spec.fit == "squash":
        processor = SiglipImageProcessorPil(size=square, resample=spec.resample)
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": spec.resize}, crop_size=square, resample=spec.resample)
    picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    created = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return created.astype(int)


def apart(file, spec, decode):
    """Differences from what transformers makes: int64 [3, size, size]."""
    return decode_pixels(file, replace(spec, decode=decode)).astype(int) - published(file, spec)


@cache
def photograph(width, height, seed=0):
    """Light and shade of all sizes as in nature, objects with edges, and a camera's grain."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** 1.1
    light = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(height, width))
    forms = Image.fromarray(rng.integers(40, 215, (4, 5, 3), np.uint8)).resize((width, height), 3)
    draw = ImageDraw.Draw(forms)
    for x, y, radius in rng.random((8, 3)) * (width, height, min(width, height) / 4):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(30, 220, 3).tolist()))
    # A lens draws no edge that is sharp to the pixel.
    soft = np.asarray(forms.filter(ImageFilter.GaussianBlur(0.7)), float)
    grain = rng.normal(0, 3, (height, width, 1))
    light *= 28 / max(light.std(), 1e-9)
    return Image.fromarray((soft + light[..., None] + grain).clip(0, 255).astype(np.uint8))


def assert_near(difference):
    """Within 1, but for a value here and there that two roundings have moved: within 2."""
    beside = np.abs(difference)
    assert beside.max() <= 2
    assert (beside == 2).sum() <= max(2, 1e-5 * beside.size)


def jpeg(picture, orientation=1, **save):
    packed, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    # What Pillow writes at once; noise of the best quality, progressive, does not fit into its 64 kB.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ImageFile, "MAXBLOCK", 2**23)
        picture.save(packed, "JPEG", exif=exif, **save)
    return packed


sides = st.integers(1, 300)
pictures = st.builds(
    lambda width, height, seed, rough, mode: (
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (rough * 3, rough * 4, 3), np.uint8))
        .resize((width, height), Image.Resampling.BICUBIC)
        .convert(mode)
    ),
    sides,
    sides,
    st.integers(0, 10**6),
    st.sampled_from([1, 4, 100]),
    st.sampled_from(["RGB", "RGB", "L", "CMYK"]),
)
specs = st.builds(
    lambda spec, resample: replace(spec, resample=RESAMPLING[resample]),
    st.sampled_from([SQUASH, CROP, PixelSpec(20, fit="crop", resize=27), PixelSpec(24, fit="crop", resize=16)]),
    st.sampled_from(list(RESAMPLING)),
)


@settings(deadline=None, max_examples=300)
@given(
    picture=pictures,
    spec=specs,
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    orientation=st.integers(0, 9),
)
def test_any_jpeg_is_seen_as_transformers_sees_it(picture, spec, quality, subsampling, progressive, orientation):
    """Exactly, or nearly; of a part of its size only where that leaves twice the model's."""
    flags = {"quality": quality, "progressive": progressive}
    flags |= {"subsampling": subsampling} if picture.mode == "RGB" else {}
    file = jpeg(picture, orientation, **flags)
    assert not apart(file, spec, "exact").any()
    assert_near(apart(file, spec, "fast"))
    if min(picture.size) < 2 * decoder.REDUCED_MARGIN * (spec.resize or spec.size):
        assert_near(apart(file, spec, "reduced"))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**6), specs)
def test_noise_of_any_shape_is_resized_as_pillow_does(width, height, seed, spec):
    """The roughest picture that there is, from far above and far below the model's size."""
    noise = np.random.default_rng(seed).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    picture = Image.fromarray(noise)
    exact = resize_to_spec(picture, replace(spec, decode="exact")).astype(int)
    assert_near(resize_to_spec(picture, replace(spec, decode="fast")) - exact)


@pytest.mark.parametrize("spec", [PixelSpec(224), PixelSpec(224, fit="crop", resize=224)], ids=["squash", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (1921, 1081), (683, 1024), (150, 120)])
def test_fast_is_what_transformers_does_with_torchvision(size, spec):
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    square = {"height": 224, "width": 224}
    processor = SiglipImageProcessor(size=square, resample=3) if spec.fit == "squash" else CLIPImageProcessor()
    file = jpeg(photograph(*size), quality=90)
    created = processor(Image.open(file), do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(decode_pixels(file, spec), created)


@pytest.mark.parametrize("spec", [SQUASH, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 5000), (5000, 1200)])
def test_of_any_proportion(size, spec):
    """The last one is of more than 16 MB, which Pillow would otherwise hold in pieces."""
    file = jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)))
    assert not apart(file, spec, "exact").any()
    assert_near(apart(file, spec, "fast"))


def test_large_pictures_too_take_the_fast_way(monkeypatch):
    file, chosen = jpeg(photograph(4032, 1200)), []
    monkeypatch.setattr(decoder, "resize_with_torch", lambda *a: chosen.append(resize_with_torch(*a)) or chosen[-1])
    decode_pixels(file, SQUASH)
    import torch

    quick = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert [created is not None for created in chosen] == [quick]


@pytest.mark.parametrize("spec", [PixelSpec(224), PixelSpec(224, fit="crop", resize=224)], ids=["squash", "crop"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(1920, 1440), (1437, 961), (901, 1353), (897, 1795), (2403, 1801)])
def test_photographs_at_a_part_of_their_size(size, orientation, spec):
    """As near as is said, at sizes that no part divides evenly too: a shift of half a pixel would show at the edges."""
    file = jpeg(photograph(*size), orientation, quality=90)
    difference = apart(file, spec, "reduced")
    assert np.abs(difference).max() <= 10
    assert (difference**2).mean() <= 255**2 / 10**4.8  # 48 dB


def test_a_part_is_decoded_only_where_it_is_large_enough(monkeypatch):
    """By the size that is decoded, and never of a picture whose part of a pixel would come to lie on another side."""
    decoded = []

    def noting(picture, *how):
        decoded.append(picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size)
        return resize_to_spec(picture, *how)

    monkeypatch.setattr(decoder, "resize_to_spec", noting)
    spec = PixelSpec(100, decode="reduced")
    for size, orientation, expected in (
        ((399, 900), 1, (399, 900)),
        ((400, 901), 1, (200, 451)),
        ((900, 801), 1, (225, 201)),
        ((4001, 3001), 1, (501, 376)),
        ((400, 901), 6, (901, 400)),
        ((400, 902), 6, (451, 200)),
        ((800, 802), 3, (400, 401)),
    ):
        decode_pixels(jpeg(photograph(*size), orientation), spec)
        assert decoded.pop() == expected
    decode_pixels(jpeg(photograph(4000, 3000)), replace(spec, decode="fast"))
    assert decoded.pop() == (4000, 3000)
    packed = io.BytesIO()
    photograph(900, 900).save(packed, "PNG")
    decode_pixels(packed, spec)
    assert decoded.pop() == (900, 900)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A folder of files that are not what they seem."""
    folder = tmp_path_factory.mktemp("messy")
    whole = jpeg(photograph(400, 300)).getvalue()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<!DOCTYPE html><html></html>")
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    return folder


@pytest.mark.parametrize("decode", ["exact", "fast", "reduced"])
@pytest.mark.parametrize("case", MESSY)
def test_what_is_no_picture_is_refused_in_the_same_words(case, decode, messy):
    name, report = MESSY[case]
    with pytest.raises(DataError, match=report) as raised:
        load_pixels(messy / name, replace(SQUASH, decode=decode))
    assert str(messy / name) in raised.value.message and "prep" in raised.value.hint


def test_other_formats_and_modes(tmp_path):
    """Pictures with transparency, palettes, 16 bits and false names: near the exact way."""
    base = Image.open(write_patterned_image(tmp_path / "rgb.png", 3, (130, 90)))
    base.save(tmp_path / "png.jpg", format="PNG")
    base.save(tmp_path / "webp.jpg", format="WEBP")
    base.save(tmp_path / "jpeg.png", format="JPEG")
    base.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    base.convert("L").save(tmp_path / "grey.png")
    layered = base.convert("RGBA")
    layered.putalpha(Image.linear_gradient("L").resize(base.size))
    layered.save(tmp_path / "layered.png")
    deep = np.linspace(0, 65535, 90 * 130).reshape(90, 130).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    base.convert("CMYK").save(tmp_path / "cmyk.tif")
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 9
    for path in files:
        for spec in (SQUASH, CROP):
            exact = load_pixels(path, replace(spec, decode="exact")).astype(int)
            for way in ("fast", "reduced"):
                assert_near(load_pixels(path, replace(spec, decode=way)) - exact)


def test_what_is_uploaded_is_refused_before_it_is_decoded():
    """A progressive JPEG is held whole, however small it is decoded."""
    for way in ("exact", "fast", "reduced"):
        spec = replace(SQUASH, decode=way)
        assert decode_pixels(jpeg(photograph(800, 600)), spec, max_pixels=200_000).shape == (3, SIZE, SIZE)
        with pytest.raises(DataError, match="800 x 600"):
            decode_pixels(jpeg(photograph(800, 600), progressive=True), spec, max_pixels=200_000)


DAMAGES = {
    "whole": lambda whole, at: whole,
    "cut": lambda whole, at: whole[:at],
    "a byte of it another": lambda whole, at: whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :],
    "bytes of it gone": lambda whole, at: whole[:at] + whole[at + 40 :],
    "more behind it": lambda whole, at: whole + whole[: at // 3],
}


@settings(deadline=None, max_examples=300)
@given(
    damage=st.sampled_from(list(DAMAGES)),
    share=st.floats(0, 1, exclude_max=True),
    how=st.fixed_dictionaries(
        {"quality": st.sampled_from([5, 75, 100])},
        optional={"progressive": st.just(True), "subsampling": st.sampled_from([0, 1, 2])},
    ),
    keep_rgb=st.booleans(),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    restarts=st.sampled_from([0, 3]),
    orientation=st.integers(1, 8),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    decode=st.sampled_from(["fast", "reduced"]),
)
def test_of_a_damaged_file_pillow_says_what_it_is(
    damage, share, how, keep_rgb, mode, restarts, orientation, size, decode
):
    """The same pixels, or the same refusal, whoever decodes it."""
    if mode != "RGB":
        how = {"quality": how["quality"]}
    elif keep_rgb:
        how = how | {"keep_rgb": True, "subsampling": 0}
    whole = jpeg(photograph(*size).convert(mode), orientation, restart_marker_blocks=restarts, **how).getvalue()
    file = DAMAGES[damage](whole, int(share * len(whole)))

    def outcome():
        try:
            return decode_pixels(io.BytesIO(file), PixelSpec(8, decode=decode))
        except DataError as error:
            return error.message

    with pytest.MonkeyPatch.context() as patched:
        directly, chosen = decoder.jpeg.decode_jpeg, []
        patched.setattr(decoder.jpeg, "decode_jpeg", lambda *a: chosen.append(directly(*a)) or chosen[-1])
        actual = outcome()
        patched.setattr(decoder.jpeg, "decode_jpeg", lambda *_: None)
        expected = outcome()
    if damage == "whole":
        assert (chosen[0] is not None) == (mode == "RGB"), "Pillow is not compared with itself"
    if isinstance(expected, str) or isinstance(actual, str):
        assert actual == expected
    else:
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("part", [1, 2, 4])
def test_what_is_decoded_at_once_is_what_pillow_decodes(part, orientation, tmp_path):
    size = (91, 63)
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(photograph(*size), orientation).getvalue())

    def opened():
        picture = Image.open(path)
        picture.draft(None, tuple(side // part for side in size))
        return picture

    picture = opened()
    actual = decoder.jpeg.decode_jpeg(path, picture)
    assert picture.fp is None, "closed"
    assert actual.flags.c_contiguous
    assert np.array_equal(actual, np.asarray(ImageOps.exif_transpose(opened())))


ODD_ORIENTATIONS = {
    # Type in TIFF, count, value or where it lies, what lies behind the entry.
    "six": (3, 1, struct.pack("<HH", 6, 0), b""),
    "a letter": (2, 2, b"6\0\0\0", b""),
    "a byte of no type": (7, 1, b"6\0\0\0", b""),
    "six and a half": (5, 1, struct.pack("<I", 26), struct.pack("<II", 13, 2)),
    "six of one": (5, 1, struct.pack("<I", 26), struct.pack("<II", 6, 1)),
    "none of none": (5, 1, struct.pack("<I", 26), struct.pack("<II", 0, 0)),
    "a float": (11, 1, struct.pack("<f", 6.5), b""),
    "two": (3, 2, struct.pack("<HH", 6, 6), b""),
    "nine": (3, 1, struct.pack("<HH", 9, 0), b""),
}


@pytest.mark.parametrize("given_as", ODD_ORIENTATIONS)
def test_an_orientation_is_what_pillow_takes_for_one(given_as):
    kind, count, value, behind = ODD_ORIENTATIONS[given_as]
    entry = struct.pack("<HHI", 0x0112, kind, count) + value
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0) + behind
    packed = io.BytesIO()
    photograph(90, 70).save(packed, "JPEG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(packed)).size == (70, 90)
    assert turned == (given_as in ("six", "six of one", "two"))
    assert_near(apart(packed, SQUASH, "fast"))
    assert np.array_equal(decode_pixels(packed, replace(SQUASH, decode="reduced")), decode_pixels(packed, SQUASH))


def test_exif_that_cannot_be_read_says_nothing(monkeypatch):
    packed = jpeg(photograph(90, 70), orientation=6)
    monkeypatch.setattr(Image.Image, "getexif", lambda _: {}[0])
    assert decoder.jpeg.decode_jpeg(packed, Image.open(packed)).shape == (70, 90, 3)


def test_of_several_pictures_in_one_file_the_first_is_seen(monkeypatch):
    packed, chosen = io.BytesIO(), []
    photograph(90, 70).save(packed, "MPO", save_all=True, append_images=[photograph(90, 70, seed=1)])
    assert Image.open(packed).format == "MPO"
    directly = decoder.jpeg.decode_jpeg
    monkeypatch.setattr(decoder.jpeg, "decode_jpeg", lambda *a: chosen.append(directly(*a)) or chosen[-1])
    assert_near(apart(packed, SQUASH, "fast"))
    assert chosen[0] is not None


def test_the_exact_way_is_pillows_alone(monkeypatch):
    monkeypatch.setattr(decoder.jpeg, "decode_jpeg", lambda *_: pytest.fail("asked"))
    decode_pixels(jpeg(photograph(90, 70)), replace(SQUASH, decode="exact"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_too_many_pixels_are_refused_whatever_is_done_with_warnings(decode, tmp_path):
    """Between Pillow's warning and its error; that the filters of warnings belong to all threads must not matter."""
    photograph(90, 70).save(tmp_path / "large.jpg")
    for most in (90 * 70 - 1, 90 * 70):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Image, "MAX_IMAGE_PIXELS", most)
            patched.setattr(decoder.warnings, "simplefilter", lambda *_: None)
            refused = pytest.raises(DataError, match="more pixels than is safe") if most < 90 * 70 else nullcontext()
            with refused:
                decode_pixels(tmp_path / "large.jpg", replace(SQUASH, decode=decode))


def test_what_is_no_jpeg_of_colours_is_left_to_pillow(tmp_path):
    for name, mode, kind in (("grey.jpg", "L", "JPEG"), ("print.jpg", "CMYK", "JPEG"), ("colours.png", "RGB", "PNG")):
        photograph(90, 70).convert(mode).save(tmp_path / name, kind)
        with Image.open(tmp_path / name) as picture:
            assert decoder.jpeg.decode_jpeg(tmp_path / name, picture) is None
