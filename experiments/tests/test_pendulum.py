"""The example of reinforcement learning, kept in a CSV file."""

import numpy as np

import pendulum
import runs


def test_what_the_example_prints_is_kept(tmp_path, monkeypatch, capsys):
    example, rng, returns = pendulum.load_example(), np.random.default_rng(0), {}

    def learn(method, has_target, rates, keys):
        assert rates.tolist() == np.float32(example.RATES).tolist()
        return returns.setdefault((method, has_target), rng.integers(-1200, -100, (len(rates), len(keys))))

    monkeypatch.setattr(example, "learn", learn)
    monkeypatch.setattr(pendulum, "load_example", lambda: example)
    pendulum.main(["--results", str(tmp_path)])
    rows = runs.read_rows(tmp_path / "pendulum.csv", pendulum.Episodes)
    assert len(rows) == len(example.RUNS) * len(example.RATES) * example.SEEDS
    for row in rows:
        expected = returns[row.method, row.target == "yes"][example.RATES.index(row.rate), row.seed]
        assert row.mean_return == expected
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Adam")]
    assert pendulum.table(rows).splitlines()[2:] == printed
    assert pendulum.table(rows[: example.SEEDS]).endswith(f"{printed[0].split(' |')[2].strip(' |')} |")
