import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tuning.settings.augmentation import POLICIES
from tuning.training.augment import BLUR, BRIGHTNESS, COLUMNS, CONTRAST, OPERATION, SIZE, augment, epoch_table, sampled
from tuning.training.mixing import mixing
from tuning.training.trivial import OPERATIONS


def batch(count=4, side=32):
    return torch.rand((count, 1, side, side), generator=torch.Generator().manual_seed(0))


def test_the_table_depends_on_seed_and_epoch_alone():
    assert torch.equal(epoch_table(1, 2, 10), epoch_table(1, 2, 10))
    assert not torch.equal(epoch_table(1, 2, 10), epoch_table(1, 3, 10))
    assert not torch.equal(epoch_table(1, 2, 10), epoch_table(2, 2, 10))


def test_no_policy_changes_nothing():
    images = batch()
    assert torch.equal(augment(images, epoch_table(0, 1, 4), "none"), images)


@pytest.mark.parametrize(
    "policy", [*(name for name in POLICIES if name != "none"), "crop=0.5", "trivial=1", "light crop=0.3"]
)
def test_views_keep_shape_and_range_and_do_not_depend_on_the_batch(policy):
    images, table = batch(), epoch_table(0, 4, 4)
    before = images.clone()
    views = augment(images, table, policy)
    assert views.shape == images.shape
    assert torch.equal(images, before)
    assert views.min() >= 0 and views.max() <= 1
    assert not torch.equal(views, images)
    alone = torch.cat([augment(images[i : i + 1], table[i : i + 1], policy) for i in range(4)])
    assert torch.equal(views, alone)


def test_stronger_policies_change_more():
    images, table = batch(64), epoch_table(0, 1, 64)
    smooth = torch.nn.functional.avg_pool2d(images, 9, stride=1, padding=4)
    changes = [(augment(smooth, table, name) - smooth).abs().mean().item() for name in POLICIES]
    assert changes == sorted(changes)


def test_a_middling_table_moves_nothing_and_a_flip_mirrors():
    images = batch(1)
    still = torch.full((1, COLUMNS), 0.5)
    assert torch.allclose(augment(images, still, "light"), images, atol=1e-5)
    flipped = still.clone()
    flipped[:, 1] = 0.0
    assert torch.equal(augment(images, flipped, "light"), augment(images, still, "light"))  # which mirrors nothing
    views = augment(images, flipped, "medium"), augment(images.flip(-1), still, "medium")
    assert torch.allclose(*views, atol=1e-5)


def test_contrast_brightness_and_blur():
    images, table = 0.3 + 0.4 * batch(2), torch.full((2, COLUMNS), 0.5)
    table[:, BLUR] = 0.0
    table[0, CONTRAST], table[1, BRIGHTNESS] = 0.75, 0.75
    (contrast, brightness), mean = augment(images, table, "medium"), images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(contrast, mean[0] + 1.1 * (images[0] - mean[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(brightness, images[1] + 0.1 * mean[1], atol=1e-5, rtol=0)

    blurred = torch.full((2, COLUMNS), 0.5)
    blurred[1, BLUR] = 1.0  # half of each pixel is the blurred copy's
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    wanted = torch.nn.functional.conv2d(padded, torch.outer(binomial, binomial).view(1, 1, 5, 5))
    for view, image, blur, share in zip(augment(images, blurred, "medium"), images, wanted, (0.25, 0.5), strict=True):
        torch.testing.assert_close(view, torch.lerp(image, blur, share), atol=1e-5, rtol=0)


def test_without_border_padding_views_are_the_same():
    images = batch(3)
    grid = 1.5 * (
        2 * torch.rand(3, images.shape[-1], images.shape[-1], 2, generator=torch.Generator().manual_seed(0)) - 1
    )
    torch.testing.assert_close(
        sampled(images, grid, border=False), sampled(images, grid, border=True), atol=1e-5, rtol=0
    )


def test_a_policy_of_ones_own_is_its_base_with_other_strengths():
    images, table = batch(8), epoch_table(0, 1, 8)
    table[:, 1] = 0.0  # mirrored, if the policy does that
    assert torch.equal(augment(images, table, "mine: light"), augment(images, table, "light"))
    mirrored, not_mirrored = augment(images, table, "medium"), augment(images, table, "medium flip=0")
    assert not torch.allclose(mirrored, not_mirrored, atol=0.05)
    assert torch.equal(augment(images, table, "flip=1"), augment(images, table, "flip=1 rotate=0"))
    assert torch.allclose(augment(images, table, "flip=1"), images.flip(-1), atol=1e-5)
    assert torch.equal(augment(images, table, "rotate=0"), images)
    darker = augment(images, table, "brightness=0.5")
    ratio = darker.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))
    assert torch.equal(images, batch(8)) and ratio.abs().max() > 0.05


def test_what_came_later_leaves_the_first_columns_as_they_were():
    first = np.random.default_rng([5, 3]).random((7, COLUMNS), dtype=np.float32)
    assert np.array_equal(epoch_table(5, 3, 7)[:, :COLUMNS].numpy(), first)


def test_a_crop_is_a_rectangle_of_the_image_at_least_as_large_as_is_said():
    ramp = torch.linspace(0, 1, 64)
    images = torch.stack([ramp.expand(64, 64), ramp.view(-1, 1).expand(64, 64)]).repeat(200, 1, 1, 1)
    views = augment(images, epoch_table(0, 1, 200), "crop=0.5")
    low, high = views.amin(dim=(2, 3)), views.amax(dim=(2, 3))
    sides = (high - low) / (63 / 64)
    areas, ratios = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert 0.45 < areas.min() < 0.55 and 0.93 < areas.max() < 1.04
    assert ratios.min() > 0.7 and ratios.max() < 1.4 and ratios.std() > 0.1
    assert low.min() < 0.05 and low.max() > 0.2  # anywhere


def changed(place, size, count=1):
    """Images after one of TrivialAugment's operations, and before."""
    images, table = 0.2 + 0.5 * batch(count), torch.full((count, COLUMNS + 10), 0.5)
    table[:, OPERATION], table[:, SIZE] = (place + 0.5) / len(OPERATIONS), (size + 1) / 2
    return augment(images, table, "trivial=1"), images


@pytest.mark.parametrize("place", range(len(OPERATIONS)))
def test_each_operation_changes_the_image_and_only_those_without_a_strength_do_at_none(place):
    strong, images = changed(place, 0.9)
    assert torch.equal(strong, images) == (OPERATIONS[place] is None)
    assert torch.allclose(changed(place, 0.0)[0], images, atol=0.005) == (place not in (11, 12))


def test_views_of_colour_images_do_not_depend_on_the_batch_though_threads_share_the_work():
    images = torch.rand((24, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    images, table = images.contiguous(memory_format=torch.channels_last), epoch_table(0, 1, 24)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        views = augment(images, table, "trivial=1")
        alone = torch.cat([augment(images[i : i + 1], table[i : i + 1], "trivial=1") for i in range(24)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(views, alone)


def test_tones_are_those_of_pillow():
    image = Image.fromarray((batch(1, 256)[0, 0] * 100 + 50).byte().numpy())
    images, size = torch.from_numpy(np.asarray(image)[None, None] / np.float32(255)), torch.full((1, 1, 1, 1), 0.5)
    wanted = {
        9: ImageOps.posterize(image, 5),
        10: ImageOps.solarize(image, 128),
        11: ImageOps.autocontrast(image),
        12: ImageOps.equalize(image),
    }
    for place, other in wanted.items():
        found = OPERATIONS[place](images, size)[0, 0] * 255
        assert np.abs(found.numpy() - np.asarray(other, np.float32)).max() < (3 if place == 12 else 1.01), place


@pytest.mark.parametrize("side", [24, 32, 64])
def test_small_images_are_equalized_evenly(side):
    """Pillow makes up to a quarter of them white."""
    levels = torch.randint(50, 150, (1, 1, side, side), generator=torch.Generator().manual_seed(0)) / 255
    found = OPERATIONS[12](levels, torch.zeros(1, 1, 1, 1))
    assert (found > 0.99).float().mean() < 0.03 and found.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("policy", ["mixup=0.4", "cutmix=1", "light mixup=0.2 cutmix=1"])
def test_an_image_is_mixed_as_its_share_of_the_label_says(policy):
    table = epoch_table(0, 1, 300)
    mixed = mixing(table, policy, 32, torch.device("cpu"))
    values = torch.arange(300.0).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    positions = np.arange(300)[::-1].copy()
    found = mixed.of(values[positions], values[mixed.partners[positions]], positions).mean(dim=(1, 2, 3))
    shares = torch.from_numpy(mixed.shares[positions])
    wanted = shares * torch.from_numpy(positions) + (1 - shares) * torch.from_numpy(mixed.partners[positions])
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-3)
    assert 0.4 < shares.mean() < 0.75 and len(set(mixed.partners)) > 150
    boxed = (mixed.boxes[:, 1] > mixed.boxes[:, 0]) & (mixed.boxes[:, 3] > mixed.boxes[:, 2])
    assert boxed.float().mean().item() == pytest.approx({"m": 0.0, "c": 1.0, "l": 0.5}[policy[0]], abs=0.08)


def test_other_policies_mix_nothing():
    assert mixing(epoch_table(0, 1, 8), "strong", 32, torch.device("cpu")) is None
    images, table = batch(), epoch_table(0, 1, 4)
    assert torch.equal(augment(images, table, "mixup=0.3"), images)  # here: partners are not known
