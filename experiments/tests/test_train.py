"""The networks, and the program that trains them."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rows import ANY_RUN

import bnp_optax as bnp
import images
import models
import runs
import train
from programs import UserError
from runs import Run


@pytest.mark.parametrize("normalization", ["bn", "gn", "none"])
@pytest.mark.parametrize(
    ("make", "shape", "covered"),
    [
        (models.MLP, (2, 28, 28, 1), 4),
        (models.CNN, (2, 32, 32, 3), 5),
        (models.resnet_18, (2, 32, 32, 3), 18 + 3),  # and three projections
        (models.resnet_20, (2, 32, 32, 3), 20 + 2),
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
        logits, records = bnp.linen.capture(model)({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), records

    for step, batch in enumerate(images.batches(run, data.train)):
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


def test_how_long_runs_will_take_is_told_before_they_start(tmp_path, monkeypatch):
    assert 0 < train.seconds_a_step(ANY_RUN, Path(), steps=1) < 60
    monkeypatch.setattr(train, "seconds_a_step", lambda run, data_dir: {"sgd": 2.0, "bn": 4.0}[run.method])
    output = tmp_path / "runs.csv"
    done, *todo = [
        dataclasses.replace(ANY_RUN, method=method, seed=seed, examples=32 * 900)
        for method in ("sgd", "bn")
        for seed in (0, 1)
    ]
    runs.append(output, runs.Result(done, "abc", 1.0, [], [], [], [], math.nan, math.nan))
    assert train.forecast([done, *todo], output, Path()) == (
        "3 runs to go, 2.5 hours by one process; seconds a step: sgd 2, bn 4"  # (2 + 4 + 4) s, 900 times
    )
    assert train.forecast([done], output, Path()).startswith("0 runs to go, 0.0 hours")


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
        (["--lr", "0"], "argument --lr: must be a number greater than 0"),
        (["--workers", "0"], "argument --workers: must be a whole number of at least 1"),
        (["--refresh-every", "0"], "argument --refresh-every: must be a whole number of at least 1"),
        (["--method", "adam"], "invalid choice: 'adam'"),
        (["--scaling", "rows"], "argument --scaling: must be examples, none or a positive number, not 'rows'"),
        (["--scaling", "0"], "argument --scaling: must be examples, none or a positive number, not '0'"),
        (["--optimizer", "adam", "--method", "bnp"], "--method bnp is BNP before SGD"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("model", "size", "width"), [("mlp", 3, 100), ("cnn", 3, 32), ("resnet18", 3, 64)])
def test_groups_divide_the_layers(model, size, width):
    with pytest.raises(UserError, match=f"--group-size {size} does not divide the {width} units of a layer"):
        train.main(["--model", model, "--method", "gn", "--group-size", str(size)])


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


def test_bounds_are_what_they_say():
    kernel = jnp.arange(6.0).reshape(2, 3)
    step = 0.01 * jnp.ones((2, 3))
    np.testing.assert_array_equal(train.clip_kernel(0.03, step, kernel), step)
    np.testing.assert_allclose(
        jnp.linalg.norm(train.clip_kernel(0.03, 100 * step, kernel)), 0.03 * jnp.linalg.norm(kernel)
    )
    np.testing.assert_array_equal(train.clip_kernel(0.03, 100 * step[0], kernel[0]), 100 * step[0])
