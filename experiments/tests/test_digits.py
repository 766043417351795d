"""The demo, in a short form."""

import matplotlib.image
import numpy as np
import pytest

import digits


def test_digits(tmp_path, capsys):
    picture = tmp_path / "digits.png"
    arguments = ["--epochs", "2", "--seeds", "1", "--batch-sizes", "64", "16", "--rates", "0.1", "0.3"]
    results = digits.main([*arguments, "--output", str(picture)])
    assert list(results) == [64, 16]
    for by_method in results.values():
        assert list(by_method) == ["SGD", "BN", "BNP", "Adam", "BNP(Adam)"]
    assert results[16]["BNP"].test.mean() > 85  # a guess is right in 10 %
    assert results[16]["BNP(Adam)"].test.mean() > 85
    assert np.std(matplotlib.image.imread(picture)) > 0.05
    assert "works" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1"),
        (["--rates", "-1"], "argument --rates: must be a number greater than 0"),
        (["--batch-sizes", "2000"], "--batch-sizes must lie between 1 and 1024"),
        (["--methods", "Muon"], "invalid choice: 'Muon'"),
        (["--output", "missing/digits.png"], "--output must be a .png file in a folder that exists"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        digits.main(arguments)
    assert message in capsys.readouterr().err
