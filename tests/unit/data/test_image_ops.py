"""Each operation against Pillow's or a formula; ranges, probabilities, and purity in (seed, epoch, sample)."""

import dataclasses

import numpy as np
import pytest
from helpers import write_patterned_image
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlkit.config.data import IMAGE_OPERATION_RANGES, IMAGE_OPERATIONS, ImageAugmentSettings
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.augment.render import RenderJob, render_images
from vlkit.data.images.decode import load_rgb
from vlkit.errors import UsageError

OFF = dict.fromkeys(IMAGE_OPERATIONS, 0.0)
SAMPLES = [f"sample-{number}" for number in range(600)]


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> np.ndarray:
    path = write_patterned_image(tmp_path_factory.mktemp("photo") / "photo.png", seed=3, size=(120, 90))
    return np.asarray(Image.open(path).convert("RGB"))


def only(name: str, amount: float | None = None, **more) -> ImageAugmenter:
    """A variation that always applies one operation, by one amount."""
    fixed = {f"{name}_range": (amount, amount)} if amount is not None else {}
    return ImageAugmenter.from_settings(ImageAugmentSettings(**{**OFF, name: 1.0, **fixed, **more}))


def apart(one: np.ndarray, other: Image.Image | np.ndarray) -> np.ndarray:
    assert one.shape == np.asarray(other).shape
    return np.abs(one.astype(int) - np.asarray(other).astype(int))


@pytest.mark.parametrize("name", IMAGE_OPERATION_RANGES)
def test_amounts_fill_their_range_and_never_leave_it(name):
    low, high = getattr(ImageAugmentSettings(), f"{name}_range")
    amounts = [only(name).chosen_operations(0, sample)[name] for sample in SAMPLES]
    assert low <= min(amounts) < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < max(amounts) <= high
    assert np.mean(amounts) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_an_operation_is_applied_as_often_as_it_should(name):
    often = ImageAugmenter.from_settings(ImageAugmentSettings(**{**OFF, name: 0.3}))
    share = np.mean([bool(often.chosen_operations(0, sample)) for sample in SAMPLES])
    assert share == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / len(SAMPLES)))


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_switching_one_off_leaves_the_others_as_they_were(name):
    settings = ImageAugmentSettings(**dict.fromkeys(IMAGE_OPERATIONS, 0.6))
    less = ImageAugmenter.from_settings(dataclasses.replace(settings, **{name: 0.0}))
    for sample in SAMPLES[:50]:
        chosen = ImageAugmenter.from_settings(settings).chosen_operations(3, sample)
        chosen.pop(name, None)
        assert less.chosen_operations(3, sample) == chosen


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_an_operation_changes_the_picture_and_is_pure(name, photo):
    before = photo.copy()
    variation = only(name)
    observed = [variation.apply(photo, epoch, sample) for epoch in (0, 1) for sample in ("a", "b")]
    again = [variation.apply(photo, epoch, sample) for epoch in (0, 1) for sample in ("a", "b")]
    assert all(np.array_equal(one, other) for one, other in zip(observed, again, strict=True))
    assert np.array_equal(photo, before)
    assert not any(np.array_equal(item, photo) for item in observed)
    if name in IMAGE_OPERATION_RANGES:
        assert len({item.tobytes() for item in observed}) == 4
        assert not np.array_equal(only(name, seed=7).apply(photo, 0, "a"), observed[0])


def test_flips_are_pillows(photo):
    picture = Image.fromarray(photo)
    assert np.array_equal(only("flip_horizontal").apply(photo, 0, "a"), ImageOps.mirror(picture))
    assert np.array_equal(only("flip_vertical").apply(photo, 0, "a"), ImageOps.flip(picture))


def test_turns_are_the_three_quarter_turns(photo):
    ways = [np.rot90(photo, times).tobytes() for times in (1, 2, 3)]
    observed = [ways.index(np.ascontiguousarray(only("turn").apply(photo, 0, s)).tobytes()) for s in SAMPLES[:60]]
    assert set(observed) == {0, 1, 2}


@pytest.mark.parametrize("angle", [-25.0, 10.0, 25.0])
def test_rotation_is_pillows_about_the_centre(photo, angle):
    mine = only("rotate", angle).apply(photo, 0, "a")
    pillows = Image.fromarray(photo).rotate(angle, Image.Resampling.BICUBIC)
    inner = (slice(30, 60), slice(40, 80))
    assert apart(mine[inner], np.asarray(pillows)[inner]).mean() < 2
    corner = mine[0, 0] if angle else None
    assert corner is None or apart(corner, photo.mean(axis=(0, 1)).round()).max() <= 1


def test_a_crop_is_a_window_of_the_right_size_brought_back(photo):
    observed = set()
    for sample in SAMPLES[:20]:
        mine = only("crop", 0.8).apply(photo, 0, sample)
        windows = {
            (left, top): apart(mine, Image.fromarray(photo).resize((120, 90), 3, box=(left, top, left + 96, top + 72)))
            for left in range(25)
            for top in range(19)
        }
        place, best = min(windows.items(), key=lambda item: item[1].mean())
        assert best.mean() < 1
        observed.add(place)
    assert len(observed) > 15
    assert {left < 12 for left, _ in observed} == {top < 9 for _, top in observed} == {True, False}


@pytest.mark.parametrize("amount", [0.6, 1.4])
@pytest.mark.parametrize(
    ("name", "pillows"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("low_light", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_light_and_colour_are_pillows(photo, name, pillows, amount):
    amount = min(amount, IMAGE_OPERATION_RANGES[name][1])
    mine = only(name, amount).apply(photo, 0, "a")
    assert apart(mine, pillows(Image.fromarray(photo)).enhance(amount)).max() <= 2


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_blur_is_gaussian(photo, radius):
    mine = only("blur", radius).apply(photo, 0, "a")
    assert apart(mine, Image.fromarray(photo).filter(ImageFilter.GaussianBlur(radius)))[8:-8, 8:-8].max() <= 4
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    wide = only("blur", 2.0).apply(point, 0, "a").astype(float)[:, :, 0]
    across = np.arange(41) - 20
    assert np.sqrt((wide.sum(0) * across**2).sum() / wide.sum()) == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize("deviation", [15.0, 35.0])
def test_noise_has_its_deviation_and_no_pattern(deviation):
    grey = np.full((200, 200, 3), 128, np.uint8)
    noise = only("noise", deviation).apply(grey, 0, "a").astype(float) - 128
    assert noise.std() == pytest.approx(deviation, rel=0.03)
    assert abs(noise.mean()) < 0.5
    assert abs(np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[:, :, 0].ravel(), noise[:, :, 1].ravel())[0, 1]) < 0.03


def test_opencv_keeps_to_one_thread(photo):
    import cv2

    cv2.setNumThreads(2)
    only("blur").apply(photo, 0, "a")
    assert cv2.getNumThreads() == 1


def test_what_is_forbidden_never_happens():
    settings = ImageAugmentSettings(**dict.fromkeys(IMAGE_OPERATIONS, 1.0), forbid=("saturation", "flip_vertical"))
    for sample in SAMPLES[:50]:
        assert set(IMAGE_OPERATIONS) - ImageAugmenter.from_settings(settings).chosen_operations(0, sample).keys() == {
            "saturation",
            "flip_vertical",
        }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotate": 1.2}, "--rotate 1.2 must lie between 0 and 1"),
        ({"crop_range": (0.9, 0.7)}, "--crop-range 0.9,0.7 must rise"),
        ({"crop_range": (0.0, 0.7)}, "between 0.05 and 1"),
        ({"noise_range": (-1.0, 5.0)}, "between 0 and 255"),
        ({"forbid": ("flip_vertcal",)}, "unknown 'flip_vertcal'"),
        ({"max_side": 4}, "--max-side"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        ImageAugmentSettings(**values)


@pytest.mark.parametrize("exif", [False, True])
def test_a_large_jpeg_is_reduced_while_it_is_decoded_and_looks_the_same(tmp_path, exif):
    tags = Image.Exif()
    if exif:
        tags[0x0112] = 6
    path = write_patterned_image(tmp_path / "large.jpg", seed=5, size=(2400, 1500), quality=95, exif=tags)
    small = load_rgb(path, max_side=300)
    assert small.size == ((188, 300) if exif else (300, 188))
    whole = load_rgb(path).resize(small.size, Image.Resampling.LANCZOS)
    assert apart(np.asarray(small), whole).mean() < 1.5
    grain = np.random.default_rng(0).integers(0, 255, (1500, 2400, 3)).astype(np.uint8)
    fine = tmp_path / "fine.jpg"
    Image.fromarray(grain).resize((4800, 3000), 0).crop((0, 0, 2400, 1500)).save(fine, quality=95)
    reduced = np.asarray(load_rgb(fine, max_side=600)).astype(float)
    whole = np.asarray(load_rgb(fine).resize((600, 375), Image.Resampling.LANCZOS)).astype(float)
    assert reduced.std() > 0.6 * whole.std(), "fine detail is kept, not decoded away"
    assert load_rgb(path, max_side=5000).size == ((1500, 2400) if exif else (2400, 1500))


@pytest.mark.parametrize("form", ["png", "webp"])
def test_pictures_are_the_same_on_any_number_of_processes(tmp_path, form):
    jobs = [
        RenderJob(write_patterned_image(tmp_path / f"{n}.png", seed=n), f"id{n}", epoch)
        for n in range(20)
        for epoch in (0, 1)
    ]
    variation, written = ImageAugmenter.from_settings(ImageAugmentSettings()), []
    for workers in (1, 2):
        folder = tmp_path / f"by-{workers}"
        folder.mkdir()
        actual = list(render_images(jobs, variation, folder, image_format=form, workers=workers))
        assert [job for job, _ in actual] == jobs
        written.append([(item, (folder / item.name).read_bytes()) for _, item in actual])
    assert written[0] == written[1]
    for job, (item, _) in zip(jobs, written[0], strict=True):
        expected = variation.apply(np.asarray(load_rgb(job.source)), job.epoch, job.image_id)
        assert np.array_equal(np.asarray(load_rgb(tmp_path / "by-1" / item.name)), expected)
        assert (item.height, item.width) == expected.shape[:2]
