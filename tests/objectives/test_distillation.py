"""Distillation as an objective: what it computes, what it runs, whom it teaches, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.models import adapters

KEY = jax.random.key(3)
B, C = 8, 4


def net(name="student", *, width=8, classes=C, runs=None, dtype=None):
    """A perceptron with two layers and maps [B, 2, 2, width / 4] of the first; notes its runs and their mode."""

    def init(key, inputs):
        keys = jax.random.split(key)
        size = int(np.prod(inputs.shape[1:]))
        kernels = {
            "one": jax.random.normal(keys[0], (size, width)),
            "two": jax.random.normal(keys[1], (width, classes)),
        }
        return {"params": {k: {"kernel": 0.3 * v} for k, v in kernels.items()}, "stats": {"count": jnp.zeros(())}}

    def apply(variables, inputs, *, train, key, axis=None):
        if runs is not None:
            runs.append((name, train))
        params = jax.tree.map(lambda w: w.astype(dtype or w.dtype), variables["params"])
        x = inputs.reshape(len(inputs), -1).astype(params["one"]["kernel"].dtype)
        hidden = jnp.tanh(x @ params["one"]["kernel"])
        outputs = {
            "features": hidden,
            "map": hidden.reshape(-1, 2, 2, width // 4),
            "logits": hidden @ params["two"]["kernel"],
        }
        return outputs, {"stats": {"count": variables["stats"]["count"] + train}}

    return jt.Model(init, apply, name=name)


def a_batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(rows, 2, 3, 1)).astype(np.float32),
        "label": rng.integers(0, C, rows).astype(np.int32),
    }


def a_teacher(model, seed=1):
    variables = model.init(jax.random.key(seed), a_batch()["image"])
    return jt.frozen(model, jax.tree.map(lambda leaf: 3 * leaf, variables))


def outputs_of(model, variables, batch):
    run = jax.jit(lambda variables, x: model.apply(variables, x, train=True, key=None)[0])
    return jax.tree.map(np.asarray, run(variables, batch["image"]))


def np_kd(student, teacher, temperature):
    """T² KL(teacher ‖ student), mean over the rows, in float64."""
    total = 0.0
    for s, t in zip(np.float64(student) / temperature, np.float64(teacher) / temperature, strict=True):
        q, p = np.exp(s - s.max()), np.exp(t - t.max())
        q, p = q / q.sum(), p / p.sum()
        total += temperature**2 * np.sum(p * np.log(p / q))
    return total / len(student)


def loss_of(objective, params, state, batch, **ctx):
    """One program, not one an operation."""
    return jax.jit(lambda *given: objective(*given, jt.Context(key=KEY, **ctx)))(params, state, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.9), (7.5, 0.1)])
def test_the_formula_of_the_paper(temperature, alpha):
    student, teacher, batch = net(), a_teacher(net("teacher", width=12)), a_batch()
    objective = (1 - alpha) * jt.classification(student) + alpha * jt.distillation(
        student, teacher, temperature=temperature
    )
    params, state = objective.init(KEY, batch)
    loss, _, metrics = loss_of(objective, params, state, batch)
    mine = outputs_of(student, {"params": params["student"], **state["student"]}, batch)["logits"]
    other = outputs_of(teacher.model, teacher.variables.tree, batch)["logits"]
    cross = np.mean([np.log(np.exp(z).sum()) - z[y] for z, y in zip(mine, batch["label"], strict=True)])
    expected = np_kd(mine, other, temperature)
    np.testing.assert_allclose(loss, (1 - alpha) * cross + alpha * expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["distillation"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["agreement"].value, np.mean(mine.argmax(-1) == other.argmax(-1)))


def test_four_is_the_temperature_where_nothing_is_said():
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    values = []
    for arguments in ({}, {"temperature": 4.0}, {"loss": functools.partial(jt.losses.kd, temperature=4.0)}):
        objective = jt.distillation(student, teacher, **arguments)
        values.append(float(loss_of(objective, *objective.init(KEY, batch), batch)[0]))
    assert values[0] == values[1] == values[2]


def test_each_network_runs_once_the_teacher_in_inference_mode():
    runs = []
    student, teacher, batch = net(runs=runs), a_teacher(net("teacher", runs=runs)), a_batch()
    objective = (
        0.1 * jt.classification(student)
        + 0.9 * jt.distillation(student, teacher)
        + jt.distillation(student, teacher, loss=jt.losses.hint, taps="map").named("hint")
    )
    params, state = objective.init(KEY, batch)
    runs.clear()
    _, after, metrics = loss_of(objective, params, state, batch)
    assert sorted(runs) == [("student", True), ("teacher", False)]
    assert set(params) == {"student"}
    assert after["student"]["stats"]["count"] == 1
    assert {"classification", "distillation", "hint", "agreement", "hint/agreement"} <= set(metrics)


def products(step, state, batch) -> int:
    """The matrix products of a compiled step."""
    return str(step._compiled.trace(*step._arguments(state, step.place(batch))).jaxpr).count("dot_general")


@pytest.mark.slow
def test_the_teacher_costs_its_forward_pass_and_its_weights_travel_once():
    student, model, batch = net(width=16), net("teacher", width=400), a_batch()
    teacher, optimizer = a_teacher(model), optax.sgd(0.1)
    plain = jt.classification(student)
    taught = plain + jt.distillation(student, teacher) + jt.distillation(student, teacher, taps="logits").named("more")
    counts, texts = [], []
    for objective in (plain, taught):
        state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
        counts.append(products(step, state, batch))
        texts.append(step.lower(state, batch).as_text())
    assert counts[1] == counts[0] + 2  # the two layers of the teacher, forward
    header = texts[1][texts[1].index("func.func public @main") :].split("\n")[0]
    assert header.count("tensor<6x400xf32>") == 1  # an argument, once; not a result
    assert "dense<" not in "".join(line for line in texts[1].split("\n") if "6x400" in line)


def test_only_the_student_learns():
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    objective = jt.distillation(student, teacher)
    params, state = objective.init(KEY, batch)
    value = lambda tree: loss_of(objective, params, state, batch, frozen={objective.frozen[0]: tree})[0]  # noqa: E731
    gradient = jax.jit(jax.grad(value))(teacher.variables.tree)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_teacher_from_a_training_state():
    model, batch = net("teacher"), a_batch()
    fitted = jt.fit(jt.classification(model), optax.sgd(0.1), [batch] * 3, steps=3, progress=False)
    one = jt.frozen(model, fitted.state)
    two = jt.frozen(model, {"params": fitted.state.params["teacher"], **fitted.state.state["teacher"]})
    assert jax.tree.all(jax.tree.map(np.array_equal, one.variables.tree, two.variables.tree))
    with pytest.raises(jt.InputError, match=r"no model 'other' was trained in that state; it has \['teacher'\]"):
        jt.frozen(net("other"), fitted.state)


def test_no_labels_are_needed():
    student, teacher, batch = net(), a_teacher(net("teacher")), {"image": a_batch()["image"]}
    objective = jt.distillation(student, teacher, temperature=2.0)
    optimizer = optax.adam(0.05)
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    seen = []
    for _ in range(60):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.2 * seen[0]


def test_taps_add_up_and_may_be_renamed():
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    objective = jt.distillation(student, teacher, loss=jt.losses.hint, taps=["map", "logits"])
    params, state = objective.init(KEY, batch)
    loss, _, metrics = loss_of(objective, params, state, batch)
    mine = outputs_of(student, {"params": params["student"], **state["student"]}, batch)
    other = outputs_of(teacher.model, teacher.variables.tree, batch)
    parts = {tap: np.mean((mine[tap] - other[tap]) ** 2) for tap in ("map", "logits")}
    np.testing.assert_allclose(loss, sum(parts.values()), rtol=1e-5)
    for tap, value in parts.items():
        np.testing.assert_allclose(metrics[f"distillation/{tap}"].value, value, rtol=1e-5)
    wider = a_teacher(net("teacher", classes=8))
    crossed = jt.distillation(student, wider, loss=jt.losses.hint, taps={"features": "logits"})
    params, state = crossed.init(KEY, batch)
    other = outputs_of(wider.model, wider.variables.tree, batch)["logits"]
    np.testing.assert_allclose(
        loss_of(crossed, params, state, batch)[0], np.mean((mine["features"] - other) ** 2), rtol=1e-5
    )


def test_a_tuple_of_names_hands_the_loss_the_maps_together():
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    seen = []

    def loss(mine, other):
        seen.append((mine, other))
        return jt.losses.fsp(mine, other)

    objective = jt.distillation(student, teacher, loss=loss, taps=[("map", "map")])
    loss_of(objective, *objective.init(KEY, batch), batch)
    assert isinstance(seen[-1][0], tuple)
    assert [leaf.shape for leaf in seen[-1][0]] == [(B, 2, 2, 2)] * 2


@pytest.mark.slow
def test_a_loss_is_given_what_it_names():
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    loss = functools.partial(jt.losses.dkd, alpha=0.5, beta=2.0, temperature=3.0)
    objective = jt.distillation(student, teacher, loss=loss)
    params, state = objective.init(KEY, batch)
    mine = outputs_of(student, {"params": params["student"], **state["student"]}, batch)["logits"]
    other = outputs_of(teacher.model, teacher.variables.tree, batch)["logits"]
    expected = np.mean(loss(mine, other, batch["label"]))
    np.testing.assert_allclose(loss_of(objective, params, state, batch)[0], expected, rtol=1e-6)
    with pytest.raises(jt.InputError, match="labels must be in"):
        jt.init(objective, optax.sgd(0.1), KEY, {**batch, "label": batch["label"] + C})
    with pytest.raises(jt.InputError, match="'label'"):
        jt.init(objective, optax.sgd(0.1), KEY, {"image": batch["image"]})


@pytest.mark.parametrize("loss", [None, jt.losses.rkd_distance, jt.losses.similarity_preserving, jt.losses.dist])
def test_masked_rows_do_not_count(loss):
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    objective = jt.distillation(student, teacher, loss=loss)
    params, state = objective.init(KEY, batch)

    @jax.jit
    @jax.value_and_grad
    def value(params, batch):
        return loss_of(objective, params, state, batch)[0]

    kept, gradient = value(params, {k: v[:5] for k, v in batch.items()})
    padded = {**batch, "mask": np.float32([1] * 5 + [0] * 3)}
    padded["image"] = np.concatenate([batch["image"][:5], 1e4 * np.ones((3, 2, 3, 1), np.float32)])
    got, other = value(params, padded)
    np.testing.assert_allclose(got, kept, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_a_loss_of_the_whole_batch_must_know_the_mask():
    student, teacher = net(), a_teacher(net("teacher"))
    objective = jt.distillation(student, teacher, loss=lambda s, t: jnp.mean((s - t) ** 2))
    batch = a_batch()
    params, state = objective.init(KEY, batch)
    assert np.isfinite(loss_of(objective, params, state, batch)[0])
    with pytest.raises(jt.InputError, match="mask"):
        loss_of(objective, params, state, {**batch, "mask": np.ones(B, np.float32)})
    wrong = jt.distillation(student, teacher, loss=lambda s, t: (s - t) ** 2)
    with pytest.raises(jt.InputError, match=r"one value per example \[8\] or a scalar; got shape \(8, 4\)"):
        jt.init(wrong, optax.sgd(0.1), KEY, batch)


def test_student_and_teacher_of_other_precisions():
    student, teacher, batch = net(dtype=jnp.bfloat16), a_teacher(net("teacher")), a_batch()
    objective = jt.distillation(student, teacher)
    params, state = objective.init(KEY, batch)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: loss_of(objective, p, state, batch)[0]))(params)
    assert loss.dtype == jnp.float32
    exact = jt.distillation(net(), teacher)
    np.testing.assert_allclose(loss, loss_of(exact, params, state, batch)[0], rtol=0.05)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


class TestSeveralTeachers:
    def teachers(self):
        return [a_teacher(net("teacher", width=8), 1), a_teacher(net("other", width=16), 2)]

    @pytest.mark.slow
    @pytest.mark.parametrize("weights", [None, (0.2, 0.7)])
    def test_fixed_weights(self, weights):
        student, batch, teachers = net(), a_batch(), self.teachers()
        objective = jt.distillation(student, teachers, temperature=2.0, weights=weights)
        params, state = objective.init(KEY, batch)
        loss, _, metrics = loss_of(objective, params, state, batch)
        mine = outputs_of(student, {"params": params["student"], **state["student"]}, batch)["logits"]
        each = [np_kd(mine, outputs_of(t.model, t.variables.tree, batch)["logits"], 2.0) for t in teachers]
        np.testing.assert_allclose(loss, np.dot(weights or (0.5, 0.5), each), rtol=1e-5)
        np.testing.assert_allclose([metrics[f"distillation/{k}/logits"].value for k in (0, 1)], each, rtol=1e-5)

    @pytest.mark.slow
    def test_learned_weights_favour_the_teacher_that_can_be_followed(self):
        student, batch, teachers = net(), a_batch(), self.teachers()
        objective = jt.distillation(student, teachers, temperature=2.0, learn_weights=True)
        params, state = objective.init(KEY, batch)
        start = loss_of(objective, params, state, batch)
        plain = jt.distillation(student, teachers, temperature=2.0)
        np.testing.assert_allclose(start[0], loss_of(plain, params, state, batch)[0], rtol=1e-6)
        params["student_teacher_weights"]["log_variance"] = jnp.asarray([0.3, -0.5])
        got, _, metrics = loss_of(objective, params, state, batch)
        each = [float(metrics[f"distillation/{k}/logits"].value) for k in (0, 1)]
        expected = 0.5 * (np.exp(-0.3) * each[0] + 0.3) + 0.5 * (np.exp(0.5) * each[1] - 0.5)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["distillation/weight_1"].value, 0.5 * np.exp(0.5), rtol=1e-6)
        gradient = jax.jit(jax.grad(lambda p: loss_of(objective, p, state, batch)[0]))(params)
        np.testing.assert_allclose(
            gradient["student_teacher_weights"]["log_variance"],
            [0.5 * (1 - np.exp(-0.3) * each[0]), 0.5 * (1 - np.exp(0.5) * each[1])],
            rtol=1e-4,
        )

    def test_features_through_an_adapter_for_each(self):
        student, batch, teachers = net(), a_batch(), self.teachers()
        objective = jt.distillation(
            student, teachers, loss=jt.losses.hint, taps=["features", "map"], adapter=adapters.regressor()
        )
        params, _ = objective.init(KEY, batch)
        shapes = {k: v["output"]["kernel"].shape for k, v in params.items() if k != "student"}
        assert shapes == {
            "student_features_to_teacher_0_regressor": (8, 8),
            "student_map_to_teacher_0_regressor": (2, 2),
            "student_features_to_other_1_regressor": (8, 16),
            "student_map_to_other_1_regressor": (2, 4),
        }

    @pytest.mark.parametrize("weights", [(1.0,), (1.0, np.nan)])
    def test_weights_that_do_not_fit(self, weights):
        with pytest.raises(jt.InputError, match="one finite number for each of the 2 teachers"):
            jt.distillation(net(), self.teachers(), weights=weights)


class TestAdapters:
    @pytest.mark.slow
    def test_a_regressor_learns_with_the_student(self):
        student, teacher, batch = net(), a_teacher(net("teacher", width=20)), a_batch()
        objective = jt.distillation(student, teacher, loss=jt.losses.hint, taps="map", adapter=adapters.regressor())
        optimizer = optax.adam(0.02)
        state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
        first = np.array(state.params["student_map_to_teacher_regressor"]["output"]["kernel"])
        assert first.shape == (2, 5)
        seen = []
        for _ in range(80):
            state, metrics = step(state, batch)
            seen.append(float(metrics["loss"]))
        assert seen[-1] < 0.7 * seen[0]
        assert (
            np.abs(np.asarray(state.params["student_map_to_teacher_regressor"]["output"]["kernel"]) - first).max()
            > 0.01
        )

    def test_vid_reads_the_scale_of_its_adapter(self):
        student, teacher, batch = net(), a_teacher(net("teacher", width=20)), a_batch()
        objective = jt.distillation(student, teacher, loss=jt.losses.vid, taps="map", adapter=adapters.variational())
        params, state = objective.init(KEY, batch)
        own = params["student_map_to_teacher_variational"]
        np.testing.assert_allclose(np.log1p(np.exp(np.asarray(own["scale"]))), 5.0, rtol=1e-3)
        x = outputs_of(student, {"params": params["student"], **state["student"]}, batch)["map"]
        for layer in ("hidden1", "hidden2"):
            x = np.maximum(x @ np.asarray(own[layer]["kernel"]), 0)
        mean = x @ np.asarray(own["output"]["kernel"])
        other = outputs_of(teacher.model, teacher.variables.tree, batch)["map"]
        expected = np.mean(0.5 * ((other - mean) ** 2 / 5.0 + np.log(5.0)))
        np.testing.assert_allclose(loss_of(objective, params, state, batch)[0], expected, rtol=1e-4)
        gradient = jax.jit(jax.grad(lambda p: loss_of(objective, p, state, batch)[0]))(params)
        assert np.any(gradient["student_map_to_teacher_variational"]["scale"])

    @pytest.mark.slow
    def test_review_brings_maps_to_the_shapes_of_the_teacher(self):
        maps = (np.ones((2, 8, 6, 3), np.float32), np.ones((2, 4, 3, 5), np.float32))
        targets = (np.zeros((2, 8, 6, 7), np.float32), np.zeros((2, 2, 2, 9), np.float32))
        model = adapters.review(channels=4)
        variables = model.init(KEY, (maps, targets))
        outputs, state = model.apply(variables, (maps, targets), train=True, key=None)
        assert [leaf.shape for leaf in outputs["student"]] == [leaf.shape for leaf in targets]
        assert set(state) == {"batch_stats"}

    def test_a_fixed_adapter_is_a_model_without_weights(self):
        def apply(variables, pair, *, train, key):
            return {"student": pair[0][:, :, :, :1], "teacher": pair[1][:, :, :, :1]}, {}

        fixed = jt.Model(lambda key, pair: {"params": {}}, apply)
        student, teacher, batch = net(), a_teacher(net("teacher", width=20)), a_batch()
        objective = jt.distillation(student, teacher, loss=jt.losses.hint, taps="map", adapter=fixed)
        state, step = jt.init(objective, optax.sgd(0.1), KEY, batch), jt.train_step(objective, optax.sgd(0.1))
        assert np.isfinite(float(step(state, batch)[1]["loss"]))

    def test_one_name_for_two_adapters_is_refused(self):
        student, teacher = net(), a_teacher(net("teacher"))
        terms = [
            jt.distillation(student, teacher, loss=jt.losses.hint, taps="map", adapter=adapters.regressor()).named(name)
            for name in ("a", "b")
        ]
        with pytest.raises(jt.InputError, match="two different models are named 'student_map_to_teacher_regressor'"):
            terms[0] + terms[1]


class TestCached:
    def test_it_equals_the_live_teacher(self):
        student, teacher, batch = net(), a_teacher(net("teacher", width=12)), a_batch()
        live, from_cache = jt.distillation(student, teacher), jt.distillation(student, jt.cached())
        logits = outputs_of(teacher.model, teacher.variables.tree, batch)["logits"]
        params, state = live.init(KEY, batch)
        expected = loss_of(live, params, state, batch)
        got = loss_of(from_cache, params, state, {**batch, "teacher_logits": logits})
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        assert got[2].keys() == expected[2].keys()

    def test_what_is_missing_is_named(self):
        student, batch = net(), a_batch()
        with pytest.raises(jt.InputError, match="attach the teacher's cache to the data"):
            jt.init(jt.distillation(student, jt.cached()), optax.sgd(0.1), KEY, batch)
        features = {**batch, "teacher_features": np.ones((B, 3), np.float32)}
        with pytest.raises(jt.InputError, match=r"the cache of 'teacher' holds no 'logits', but features; write it"):
            jt.init(jt.distillation(student, jt.cached()), optax.sgd(0.1), KEY, features)


class TestRefusals:
    def test_other_classes(self):
        objective = jt.distillation(net(), a_teacher(net("teacher", classes=7)))
        with pytest.raises(jt.InputError, match="student 'student' has 4 classes, teacher 'teacher' 7"):
            jt.init(objective, optax.sgd(0.1), KEY, a_batch())

    @pytest.mark.parametrize("adapter", [None, adapters.regressor()])
    @pytest.mark.parametrize(("taps", "whose"), [({"maap": "map"}, "student"), ({"map": "maap"}, "teacher")])
    def test_an_output_that_does_not_exist(self, taps, whose, adapter):
        student, teacher = net(), a_teacher(net("teacher"))
        objective = jt.distillation(student, teacher, loss=jt.losses.hint, taps=taps, adapter=adapter)
        expected = rf"unknown output of {whose} '{whose}' 'maap' \(did you mean 'map'\?\); known: features, logits, map"
        with pytest.raises(jt.InputError, match=expected):
            jt.init(objective, optax.sgd(0.1), KEY, a_batch())

    def test_shapes_that_the_loss_can_not_compare(self):
        objective = jt.distillation(net(), a_teacher(net("teacher", width=20)), loss=jt.losses.hint, taps="map")
        with pytest.raises(jt.InputError, match=r"\(8, 2, 2, 2\).*\(8, 2, 2, 5\)"):
            jt.init(objective, optax.sgd(0.1), KEY, a_batch())

    def test_arguments_that_exclude_each_other(self):
        student, teacher = net(), a_teacher(net("teacher"))
        with pytest.raises(jt.InputError, match="temperature is of the default loss"):
            jt.distillation(student, teacher, temperature=2.0, loss=jt.losses.hint)
        for temperature in (0.0, -1.0, np.nan, np.inf):
            with pytest.raises(jt.InputError, match="temperature must be positive and finite"):
                jt.distillation(student, teacher, temperature=temperature)
        with pytest.raises(jt.InputError, match=r"expected a teacher.*got dict"):
            jt.distillation(student, {"params": {}})
        with pytest.raises(jt.InputError, match="got none"):
            jt.distillation(student, [])
        with pytest.raises(jt.InputError, match="got none"):
            jt.distillation(student, teacher, taps=[])

    def test_what_a_loss_needs_and_nobody_gives(self):
        student, teacher = net(), a_teacher(net("teacher"))
        for loss, missing in ((jt.losses.kd, "temperature"), (jt.losses.vid, "scale")):
            objective = jt.distillation(student, teacher, loss=loss, taps="logits" if loss is jt.losses.kd else "map")
            with pytest.raises(jt.InputError, match=f"the loss needs '{missing}'"):
                jt.init(objective, optax.sgd(0.1), KEY, a_batch())
        with pytest.raises(jt.InputError, match="loss must be a function of two outputs"):
            jt.distillation(student, teacher, loss="kd")
        with pytest.raises(jt.InputError, match="expected a model to train as the student; got FrozenModel"):
            jt.distillation(teacher, teacher)
        with pytest.raises(jt.InputError, match=r"jt.frozen\(model, variables\).*got Model"):
            jt.distillation(student, net("teacher"))

    def test_two_terms_keep_things_of_their_own(self):
        student, teacher, batch = net(), a_teacher(net("teacher")), {**a_batch(), "index": np.arange(B)}
        other = a_teacher(net("other"), 2)
        options = {"examples": B, "negatives": 3}
        objective = jt.crd(student, teacher, dim=4, **options) + jt.crd(student, other, dim=6, **options).named("more")
        params, _ = objective.init(KEY, batch)
        heads = {name: head["student"]["kernel"].shape for name, head in params.items() if name != "student"}
        assert heads == {"student_features_crd_teacher": (8, 4), "student_features_crd_other": (8, 6)}
        twice = jt.crd(student, teacher, **options) + jt.crd(student, teacher, **options).named("more")
        with pytest.raises(jt.InputError, match="two terms of a sum keep 'student_features_crd_teacher'"):
            twice.init(KEY, batch)

    def test_a_cache_and_augmentation_in_the_step(self):
        data = jt.data.Dataset.from_arrays(np.zeros((16, 2, 3, 1), np.uint8), np.arange(16) % C)
        data = data.with_columns({"teacher_logits": np.zeros((16, C), np.float32)}, of_image=True)
        with pytest.raises(jt.InputError, match="column 'teacher_logits' of the data holds for the images as they are"):
            jt.fit(
                jt.distillation(net(), jt.cached()),
                optax.sgd(0.1),
                jt.data.pipeline(data, 8),
                steps=2,
                transform=jt.data.views.augmented(jt.data.views.random_flip()),
            )


@pytest.mark.slow
def test_training_and_evaluation_share_the_teacher_on_the_devices():
    student, teacher, batch = net(), a_teacher(net("teacher")), a_batch()
    objective = jt.distillation(student, teacher)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    state, step = jt.init(objective, optax.sgd(0.1), KEY, batch), jt.train_step(objective, optax.sgd(0.1), mesh=mesh)
    state, _ = step(state, batch)
    (placed,) = teacher.variables.placed.values()
    jt.evaluate(objective, state, [batch], mesh=mesh)
    assert list(teacher.variables.placed.values()) == [placed]
