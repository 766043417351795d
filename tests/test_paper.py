"""The programs of the paper's experiments: files of images, rows of results, resumed sweeps, tables."""

import dataclasses
import gzip
import math
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import beyond
import bnp_optax as bnp
import conditioning
import figures
import images
import models
import paper
import runs
import tables
import train
from runs import Result, Run

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROOT = Path(__file__).parent.parent


# Files of images


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, compress=gzip.compress, suffix=".gz"):
    rng = np.random.default_rng(0)
    written = {}
    folder.mkdir()
    for prefix, n in (("train", 200), ("t10k", 50)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(compress(idx(pixels)))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx(labels)))
        written[prefix] = pixels, labels
    return written


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx_files(tmp_path, compress, suffix):
    written = write_mnist(tmp_path / "mnist", compress, suffix)
    data = images.load("mnist", tmp_path)
    assert data.test.images.shape == (50, 28, 28, 1)
    np.testing.assert_array_equal(data.test.images[..., 0], written["t10k"][0])
    np.testing.assert_array_equal(data.test.labels, written["t10k"][1])
    # Training and validation images are the training file's, each once, in a tenth the classes' proportions.
    both = np.concatenate([data.train.images, data.validation.images])
    assert len(data.validation.labels) == 20
    assert (np.bincount(data.validation.labels) == 2).all()
    assert {image.tobytes() for image in both} == {image.tobytes() for image in written["train"][0]}


def test_cifar_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        planes, labels = rng.integers(0, 256, (20, 3, 32, 32), np.uint8), (np.arange(20) % 10).astype(np.uint8)
        (folder / name).write_bytes(b"".join(bytes([y]) + x.tobytes() for x, y in zip(planes, labels, strict=True)))
    data = images.load("cifar-10", tmp_path)
    assert data.train.images.shape == (90, 32, 32, 3)
    assert data.validation.images.shape == (10, 32, 32, 3)
    for colour in range(3):
        np.testing.assert_array_equal(data.test.images[..., colour], planes[:, colour])
    np.testing.assert_array_equal(data.test.labels, labels)


def corrupt(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "train-images-idx3-ubyte",
            lambda b: b[:-1],
            r"156,799 bytes of data; its header says \(200, 28, 28\)",
        ),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "156,801 bytes of data"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "not an idx file"),
        (
            "t10k-labels-idx1-ubyte",
            lambda _: b"<html>",
            "not an idx file of unsigned bytes; its first bytes are '3c",
        ),
        ("t10k-labels-idx1-ubyte", lambda _: b"", "not an idx file"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.zeros(49, np.uint8)), r"images of shape \(50, 28, 28\) and labels"),
    ],
)
def test_malformed_idx_files(tmp_path, file, change, message):
    write_mnist(tmp_path / "mnist", bytes, "")
    corrupt(tmp_path / "mnist" / file, change)
    with pytest.raises(ValueError, match=message):
        images.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "change", [lambda b: b[: len(b) // 2], lambda b: b"not gzip" + b, lambda b: b[:50] + b"x" + b[51:]]
)
def test_malformed_gzip_files(tmp_path, change):
    write_mnist(tmp_path / "mnist")
    corrupt(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", change)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: not a whole gzip file"):
        images.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; expected a multiple of 3,073"),
        (bytes(3072), "3,072 bytes; expected a multiple of 3,073"),
        (bytes([10]) + bytes(3072), "label 10 of image 0; expected 0 to 9"),
    ],
)
def test_malformed_cifar_files(tmp_path, content, message):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        images.load("cifar-10", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", r"neither .*mnist.train-images-idx3-ubyte.gz nor .* exists; mnist is published at https"),
        ("cifar-10", r"data_batch_1.bin does not exist; CIFAR-10 is published at https"),
    ],
)
def test_missing_files(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        images.load(name, tmp_path)


def test_unknown_data():
    with pytest.raises(ValueError, match="no data set 'imagenet'; there are digits, mnist"):
        images.load("imagenet", Path())


# Networks


@pytest.mark.parametrize("normalization", ["bn", "gn", "none"])
@pytest.mark.parametrize(
    ("make", "shape", "covered"),
    [
        (models.MLP, (2, 28, 28, 1), 4),
        (models.CNN, (2, 32, 32, 3), 5),
        (models.resnet_18, (2, 32, 32, 3), 18 + 3),  # and three projections
        (models.resnet_110, (2, 32, 32, 3), 110 + 2),
    ],
)
def test_networks_have_the_layers_of_their_names(normalization, make, shape, covered):
    model = make(normalization=normalization)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert len(bnp.linen.find_layers(model, x)) == covered
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert ("batch_stats" in variables) == (normalization == "bn")
    logits = jax.eval_shape(model.apply, variables, x)
    assert logits.shape == (2, 10)


def test_resnet_18_has_the_published_size():
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = models.resnet_18(large_images=True, classes=1000)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    # torchvision's ResNet-18 has 11,689,512 parameters: 9,600 of them normalize, and 1,000 are the last bias.
    assert kernels == 11_689_512 - 9_600 - 1_000


# Runs and their rows

ANY_RUN = Run("digits", "mlp", "bnp", 32, 0.1, 0, 320)


def result(rate, accuracy, loss=1.0, **changes):
    run = dataclasses.replace(ANY_RUN, rate=rate, **changes)
    test = accuracy if run.reads_test else math.nan
    return Result(run, "abc", 1.0, [160, 320], [2.0, loss], [2.0, loss], [50.0, accuracy], test, test)


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "runs.csv"
    written = [result(0.1, 90.0, prior_examples=None), result(0.3, 10.0, loss=math.inf, augment=True, reads_test=True)]
    for row in written:
        runs.append(path, row)
    first, second = runs.read(path)
    assert second == written[1]
    assert math.isnan(first.test_accuracy)
    assert dataclasses.replace(first, test_loss=0.0, test_accuracy=0.0) == dataclasses.replace(
        written[0], test_loss=0.0, test_accuracy=0.0
    )


def test_half_a_row_is_cut_off(tmp_path):
    path = tmp_path / "runs.csv"
    runs.append(path, result(0.1, 90.0, reads_test=True))
    whole = path.read_text()
    runs.append(path, result(0.3, 80.0, reads_test=True))
    path.write_text(path.read_text()[:-20])
    assert [row.run.rate for row in runs.read(path)] == [0.1]
    assert path.read_text() == whole


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("name,value\n")
    with pytest.raises(ValueError, match="its columns are"):
        runs.read(path)
    path.write_text(",".join(runs.HEADER) + "\n1,2\n")
    with pytest.raises(ValueError, match="line 2: 2 cells; expected"):
        runs.read(path)


@pytest.mark.parametrize(
    ("accuracies", "best", "window"),
    [
        ([80, 90, 89.5, 70], 0.1, (0.1, 0.3)),
        ([90, 90, 88, 89.9], 0.03, (0.03, 0.1)),  # the last one is not a neighbour
        ([10, 20, 30, 40], 1.0, (1.0, 1.0)),
        ([50, 50, 50, 50], 0.03, (0.03, 1.0)),
    ],
)
def test_best_rate_and_window(accuracies, best, window):
    tuning = [result(rate, accuracy) for rate, accuracy in zip((0.03, 0.1, 0.3, 1.0), accuracies, strict=True)]
    assert runs.best_rate(tuning[::-1]) == best
    assert runs.window(tuning[::-1]) == window


def test_a_run_that_diverged_is_never_the_best():
    assert runs.best_rate([result(0.1, 20.0), result(0.3, 95.0, loss=math.nan)]) == 0.1


# Training


def test_every_epoch_sees_every_example_once():
    split = images.Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10))
    run = dataclasses.replace(ANY_RUN, batch_size=4, examples=20)
    seen = np.concatenate([batch.labels for batch in train.batches(run, split)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    again = np.concatenate([batch.labels for batch in train.batches(run, split)])
    np.testing.assert_array_equal(seen, again)
    other = np.concatenate([b.labels for b in train.batches(dataclasses.replace(run, seed=1), split)])
    assert list(seen) != list(other)


def test_augmented_images_are_shifted_and_mirrored():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    split = images.Split(np.stack([image] * 4), np.arange(4))
    run = dataclasses.replace(ANY_RUN, augment=True, batch_size=4, examples=400)
    seen = [x for batch in train.batches(run, split) for x in batch.images]
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes(): False for i in range(9) for j in range(9)}
    windows |= {padded[i : i + 8, j : j + 8][:, ::-1].tobytes(): True for i in range(9) for j in range(9)}
    mirrored = [windows[x.tobytes()] for x in seen]
    assert 0.4 < np.mean(mirrored) < 0.6
    assert len({x.tobytes() for x in seen}) > 100


def test_schedule_of_the_residual_networks():
    run = dataclasses.replace(ANY_RUN, batch_size=1, examples=2000, schedule="steps")
    optimizer = train.make_optimizer(run, 0.1, None)
    params, step = jnp.zeros(1), jax.jit(optimizer.update)
    state, rates = optimizer.init(params), []
    for _ in range(2000):
        update, state = step(jnp.ones(1), state, params)
        rates.append(-float(update[0]))
    expected = [0.01] * 200 + [0.1] * 800 + [0.01] * 500 + [0.001] * 500
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.parametrize("refresh_every", [1, 4])
def test_training_is_what_a_plain_loop_does(refresh_every):
    options = {"momentum": 0.9, "weight_decay": 1e-3, "refresh_every": refresh_every, "reads_test": True}
    run = dataclasses.replace(ANY_RUN, **options)
    data = images.load("digits", Path())
    mean, deviation = data.train.images.mean(), data.train.images.std()
    model = models.MLP()
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    tx = bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, jnp.zeros((1, 8, 8, 1))), momentum=0.9, weight_decay=1e-3)
    state, losses = tx.init(params), []

    def loss_fn(params, x, y):
        with bnp.linen.record_inputs():
            logits, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), recorded["intermediates"]

    for step, batch in enumerate(train.batches(run, data.train)):
        x = (batch.images.astype(np.float32) - mean) / deviation
        (loss, records), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, batch.labels)
        intermediates = records if step % refresh_every == 0 else bnp.KEEP_STATISTICS
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    x = (data.test.images.astype(np.float32) - mean) / deviation
    accuracy = 100 * float((model.apply({"params": params}, x).argmax(-1) == data.test.labels).mean())
    actual = train.train(run, Path(), evaluations=2)
    np.testing.assert_allclose(actual.train_loss, [np.mean(losses[:5]), np.mean(losses[5:])], rtol=1e-4)
    assert actual.examples_seen == [160, 320]
    assert abs(actual.test_accuracy - accuracy) < 0.5


def test_a_diverged_run_ends_and_is_told():
    run = dataclasses.replace(ANY_RUN, method="sgd", rate=1e6, examples=3200)
    actual = train.train(run, Path())
    assert actual.diverged
    assert len(actual.examples_seen) < 4


@pytest.mark.parametrize("method", runs.METHODS)
def test_every_method_learns_the_digits_by_a_cnn(method, tmp_path):
    arguments = ["--model", "cnn", "--method", method, "--examples", "6400", "--test"]
    (actual,) = train.main([*arguments, "--output", str(tmp_path / "runs.csv")])
    assert actual.test_accuracy > 50  # a guess is right in 10 %


def test_a_sweep_continues_where_it_stopped(tmp_path, capsys, monkeypatch):
    output = tmp_path / "runs.csv"
    trained = []

    def counted(run, *args, **kwargs):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(run)
        return original(run, *args, **kwargs)

    original = train.train
    monkeypatch.setattr(train, "train", counted)
    arguments = ["--method", "sgd", "bnp", "--lr", "0.1", "0.3", "--examples", "64", "--output", str(output)]
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    before = output.read_text()
    assert len(runs.read(output)) == 3
    trained.clear()
    assert len(train.main(arguments)) == 4
    assert len(trained) == 1
    assert output.read_text().startswith(before)
    assert "Accuracies in percent" in capsys.readouterr().out


def test_workers_do_what_one_process_does(tmp_path):
    todo = [dataclasses.replace(ANY_RUN, rate=rate, examples=64) for rate in (0.1, 0.3)]
    alone = train.sweep(todo, tmp_path / "alone.csv", Path())
    together = train.sweep(todo, tmp_path / "together.csv", Path(), workers=2)
    for one, other in zip(alone, together, strict=True):
        assert one.run == other.run
        np.testing.assert_allclose(one.validation_loss, other.validation_loss, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100", "--examples", "64"], "--batch-size must lie between 1 and --examples"),
        (["--lr", "0"], "--lr must be positive"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--refresh-every", "0"], "--refresh-every must be at least 1"),
        (["--method", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert message in capsys.readouterr().err


def test_the_recipe_of_the_deep_residual_network():
    """All of it, on a network of the same blocks that is not deep, for a few steps."""
    run = Run("digits", "resnet110", "bnp+gn", 8, 0.1, 0, 24, 0.9, 1.5e-4, "steps", augment=True, init_scale=0.1)
    deep = train.make_model(run)
    assert (deep.blocks, deep.group_size, deep.normalization) == ((18, 18, 18), 4, "gn")
    kernel = deep.kernel_init(jax.random.key(0), (3, 3, 64, 256))
    np.testing.assert_allclose(kernel.std(), 0.1 * np.sqrt(2 / (9 * 64)), rtol=0.01)  # He-normal, a tenth of it
    shallow = deep.clone(blocks=(1, 1, 1))
    original, train.make_model = train.make_model, lambda _: shallow
    try:
        train.make_program.cache_clear()
        actual = train.train(run, Path(), evaluations=1)
    finally:
        train.make_model = original
        train.make_program.cache_clear()
    assert math.isfinite(actual.train_loss[0] + actual.validation_loss[0])


# The experiments


def test_the_protocol():
    for experiment, cells, methods in (("e1", 2 * 3 * 3, 3), ("e2", 4 * 5, 5), ("refresh", 2 * (2 * 3 + 4), 2)):
        grid = paper.grid(experiment, quick=False)
        assert len(grid) == len(set(grid)) == cells
        tuning = paper.with_rates(grid, paper.RATES[experiment], 100)
        assert not any(run.reads_test for run in tuning)
        # every method at every batch size gets the same rates, seeds and examples
        settings = {(r.data, r.model, r.batch_size, r.rate, r.seed, r.examples) for r in tuning}
        assert len(settings) * methods == len(tuning)
        rates = paper.RATES[experiment]
        assert len(rates) >= 4
        ratios = np.divide(rates[1:], rates[:-1])
        assert ((ratios > 2.9) & (ratios < 3.4)).all()
    assert len(paper.SEEDS) >= 3
    assert paper.TUNING_SEED not in paper.SEEDS


def test_the_test_images_are_read_at_the_best_rate_alone():
    tuning = [
        result(rate, accuracy, method=m)
        for m, best in (("sgd", 0.1), ("bnp", 0.3))
        for rate, accuracy in ((0.1, 90 if best == 0.1 else 80), (0.3, 85))
    ]
    final = paper.with_best_rate(tuning, [1, 2])
    assert [(run.method, run.rate, run.seed) for run in final] == [
        ("sgd", 0.1, 1), ("sgd", 0.1, 2), ("bnp", 0.3, 1), ("bnp", 0.3, 2)
    ]  # fmt: skip
    assert all(run.reads_test for run in final)


def test_the_experiments_in_a_short_form(tmp_path, capsys):
    """From no file at all to the figures and a page's tables."""
    folder = str(tmp_path / "results")
    options = ["--quick", "--results", folder, "--examples", "512", "--rates", "0.1", "0.3", "--workers", "1"]
    paper.main(["e1", *options])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: e1 -->\nold\n<!-- end -->\nafter <!-- table: summary -->\n<!-- end -->\n")
    figures.main(["--results", folder, "--pages", str(page)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert "old" not in text
    for batch_size in (60, 6, 1):
        assert re.search(rf"\| digits \| {batch_size} \| BNP \| \d+\.\d \| ", text)
    assert {path.stem for path in Path(folder).glob("*.png")} == {"batch_size", "e1_rates", "e1_curves"}
    figures.main(["--results", folder, "--pages", str(page)])
    assert page.read_text() == text
    capsys.readouterr()


@pytest.mark.parametrize("experiment", beyond.EXPERIMENTS)
def test_the_experiments_beyond_the_paper_in_a_short_form(experiment, tmp_path, capsys):
    beyond.main([experiment, "--quick", "--results", str(tmp_path), "--workers", "1"])
    results = runs.read(tmp_path / f"{experiment}.csv")
    assert len({result.run for result in results}) == len(results) >= 4
    assert not any(result.diverged for result in results)
    table = figures.make(tmp_path)[0][experiment]
    for result in results:
        assert f"{result.validation_accuracy[-1]:.1f}" in table
    capsys.readouterr()


def test_bounds_are_what_they_say():
    kernel = jnp.arange(6.0).reshape(2, 3)
    step = 0.01 * jnp.ones((2, 3))
    np.testing.assert_array_equal(train.clip_kernel(0.03, step, kernel), step)
    np.testing.assert_allclose(
        jnp.linalg.norm(train.clip_kernel(0.03, 100 * step, kernel)), 0.03 * jnp.linalg.norm(kernel)
    )
    np.testing.assert_array_equal(train.clip_kernel(0.03, 100 * step[0], kernel[0]), 100 * step[0])


def test_condition_numbers_in_a_short_form(tmp_path):
    output = tmp_path / "e4.csv"
    rows = conditioning.measure_all(output, [0], [0, 2])
    assert conditioning.read(output) == rows == conditioning.measure_all(output, [0], [0, 2])
    assert {(row.method, row.matrix) for row in rows} == {("sgd", "H"), ("bn", "H"), ("bnp", "H"), ("bnp", "P'HP")}
    assert {row.size for row in rows} == {64 * 20 + 20, 20 * 20 + 20, 20 * 10 + 10}
    start = {(row.method, row.matrix, row.layer): row for row in rows if row.step == 0}
    # at the start of BNP, P is one up to the damping: 1 + 0.01 + 0.0001
    h, php = start["bnp", "H", "Dense_1"], start["bnp", "P'HP", "Dense_1"]
    assert 1 < h.largest / php.largest <= 1.0101 * (1 + 1e-9)
    assert "e4" in figures.make(tmp_path)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["e9"], "no experiment e9; there are e1, e2"), (["e1", "--seeds", "x"], "invalid int")],
)
def test_bad_experiments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        paper.main(arguments)
    assert message in capsys.readouterr().err


def test_figures_need_results(tmp_path):
    with pytest.raises(ValueError, match="holds no CSV file"):
        figures.make(tmp_path)
    with pytest.raises(ValueError, match="no table 'e7'"):
        tables.fill_tables("<!-- table: e7 -->\n<!-- end -->", {"e1": ""})
    with pytest.raises(ValueError, match="runs of different lengths"):
        tables.cells([result(0.1, 90.0), result(0.1, 90.0, examples=640)])
    assert tables.cells([result(0.1, 90.0)]) == []  # its runs at the best rate are still to come
