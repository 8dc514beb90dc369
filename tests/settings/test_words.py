"""Counted nouns."""

from tuning.settings.words import count


def test_a_noun_agrees_with_its_number():
    assert [count(number, "epoch") for number in (0, 1, 2, 2000)] == ["0 epochs", "1 epoch", "2 epochs", "2,000 epochs"]
    assert count(1, "class", "classes") == "1 class" and count(3, "class", "classes") == "3 classes"
