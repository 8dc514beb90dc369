"""From pixels to an epoch's row: augmentation, backbones, frozen layers' outputs, the training loop."""
