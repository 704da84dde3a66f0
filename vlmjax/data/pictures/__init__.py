"""The parts of `images` and `augment`: decoding, resizing, policies, video."""
