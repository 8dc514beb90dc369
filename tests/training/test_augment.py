import pytest
import torch

from tuning.settings.augmentation import POLICIES
from tuning.training.augment import BLUR, BRIGHTNESS, COLUMNS, CONTRAST, augment, epoch_table, sampled


def batch(count=4, side=32):
    return torch.rand((count, 1, side, side), generator=torch.Generator().manual_seed(0))


def test_the_table_depends_on_seed_and_epoch_alone():
    assert torch.equal(epoch_table(1, 2, 10), epoch_table(1, 2, 10))
    assert not torch.equal(epoch_table(1, 2, 10), epoch_table(1, 3, 10))
    assert not torch.equal(epoch_table(1, 2, 10), epoch_table(2, 2, 10))


def test_no_policy_changes_nothing():
    images = batch()
    assert torch.equal(augment(images, epoch_table(0, 1, 4), "none"), images)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_views_keep_shape_and_range_and_do_not_depend_on_the_batch(policy):
    images, table = batch(), epoch_table(0, 1, 4)
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
