"""Updates in turns, against a loop of separate optimisers that is written out; and what optimisers are told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.objective import fresh

KEY = jax.random.key(7)
D, H, C = 5, 4, 3


def encoder():
    """Batch norm with a running mean, and a layer."""

    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (D, H))}, "stats": {"mean": jnp.zeros(D)}}

    def apply(variables, x, *, train, key, axis=None, still=None):
        mean = variables["stats"]["mean"]
        if train:
            mean = x.mean(0) if axis is None else jax.lax.pmean(x.mean(0), axis)
        features = jnp.tanh((x - mean[None]) @ variables["params"]["w"])
        moved = 0.9 * variables["stats"]["mean"] + 0.1 * mean if train else mean
        return {"features": features}, {"stats": {"mean": moved}}

    return jt.Model(init, apply, "encoder")


def head(name):
    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (H, C))}}

    def apply(variables, x, *, train, key):
        return {"logits": x @ variables["params"]["w"]}, {}

    return jt.Model(init, apply, name)


ENCODER, F1, F2 = encoder(), head("f1"), head("f2")


def entropy(logits, labels):
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def apart(one, other):
    return jnp.mean(jnp.sum(jnp.square(jax.nn.softmax(one) - jax.nn.softmax(other)), axis=-1))


def two_heads(fitting, discrepancy):
    """`fitting` times the cross-entropy of both heads on source, `discrepancy` times their distance on target."""
    source, target = jt.Forward.of(ENCODER, "source/image"), jt.Forward.of(ENCODER, "target/image")

    def setup(key, batch):
        features = jax.ShapeDtypeStruct((2, H), jnp.float32)
        made = {model.name: fresh(model, key, features) for model in (F1, F2)}
        return tuple({name: own[which] for name, own in made.items()} for which in (0, 1))

    def loss(outputs, params, state, batch, ctx):
        seen, logits = {"source": outputs[source]["features"], "target": outputs[target]["features"]}, {}
        for name, features in seen.items():
            for model in (F1, F2):
                found, state = ctx.run(model, params, state, features, view=name)
                logits[name, model.name] = found["logits"]
        labels = batch["source"]["label"]
        errors = [jt.losses.cross_entropy(logits["source", name], labels) for name in ("f1", "f2")]
        distance = jnp.square(jax.nn.softmax(logits["target", "f1"]) - jax.nn.softmax(logits["target", "f2"]))
        error, gap = ctx.mean(errors[0] + errors[1]), ctx.mean(jnp.sum(distance, axis=-1))
        return fitting * error.value + discrepancy * gap.value, state, {"error": error, "gap": gap}

    return jt.Objective("", (source, target), loss, setup=setup, models=(F1, F2))


def turns():
    """Maximum classifier discrepancy (Saito et al. 2018)."""
    moving = functools.partial(jt.optim.only, adapt_statistics=True)
    return (
        jt.Turn("fit", two_heads(1, 0), optax.adam(0.02)),
        jt.Turn("max", two_heads(1, -1), moving(optax.sgd(0.3, momentum=0.9), "f1|f2")),
        jt.Turn("min", two_heads(0, 1), moving(optax.adam(0.01), "encoder"), repeat=2),
    )


def batches(count=3):
    rng = np.random.default_rng(1)

    def part(rows, shift):
        return {"image": rng.normal(size=(rows, D)).astype(np.float32) + np.float32(shift)}

    return [{"source": {**part(8, 0), "label": rng.integers(0, C, 8)}, "target": part(4, 1)} for _ in range(count)]


def written_out(params, mean, data):
    """The same by hand: raw functions, `jax.grad`, three optimisers, each over what it moves."""

    def loss(params, mean, batch, fitting, discrepancy):
        logits = {}
        for name in ("source", "target"):
            x = batch[name]["image"]
            features = jnp.tanh((x - x.mean(0)[None]) @ params["encoder"]["w"])
            mean = 0.9 * mean + 0.1 * x.mean(0)
            for which in ("f1", "f2"):
                logits[name, which] = features @ params[which]["w"]
        label = batch["source"]["label"]
        error = entropy(logits["source", "f1"], label) + entropy(logits["source", "f2"], label)
        gap = apart(logits["target", "f1"], logits["target", "f2"])
        return fitting * error + discrepancy * gap, (mean, error, gap)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    heads = ("f1", "f2")
    plan = [
        (optax.adam(0.02), ("encoder", *heads), 1, 1.0, 0.0),
        (optax.sgd(0.3, momentum=0.9), heads, 1, 1.0, -1.0),
        (optax.adam(0.01), ("encoder",), 2, 0.0, 1.0),
    ]
    states = [optimizer.init({name: params[name] for name in names}) for optimizer, names, *_ in plan]
    for batch in data:
        told = []
        for number, (optimizer, names, repeat, *weights) in enumerate(plan):
            for _ in range(repeat):
                (value, (mean, error, gap)), grads = gradient(params, mean, batch, *weights)
                own = {name: params[name] for name in names}
                updates, states[number] = optimizer.update({name: grads[name] for name in names}, states[number], own)
                params = {**params, **optax.apply_updates(own, updates)}
            told.append((float(value), float(error), float(gap)))
    return params, mean, told


def trained(objective, optimizer, data, **options):
    place = {name: options.pop(name) for name in ("mesh", "mode") if name in options}
    state, step = jt.init(objective, optimizer, KEY, data[0]), jt.train_step(objective, optimizer, **place, **options)
    for batch in data:
        state, metrics = step(state, batch)
    return state, {name: float(value) for name, value in metrics.items()}


def close(got, want, tolerance):
    for path, leaf in jt.tree.leaves_by_path(want).items():
        other = np.asarray(jt.tree.leaves_by_path(got)[path])
        np.testing.assert_allclose(other, leaf, rtol=tolerance, atol=tolerance, err_msg=path)


def test_turns_are_the_loop_written_out(mesh_of):
    data, (objective, optimizer) = batches(), jt.alternate(*turns())
    start = jt.init(objective, optimizer, KEY, data[0])
    begun = jax.tree.map(jnp.array, start.params)
    params, mean, told = written_out(begun, start.state["encoder"]["stats"]["mean"], data)
    assert (
        max(np.abs(np.asarray(a - b)).max() for a, b in zip(*map(jax.tree.leaves, (params, begun)), strict=True)) > 0.1
    )
    state, metrics = trained(objective, optimizer, data)
    close(state.params, params, 1e-6)
    np.testing.assert_allclose(state.state["encoder"]["stats"]["mean"], mean, rtol=1e-6)
    for name, (value, error, gap) in zip(("fit", "max", "min"), told, strict=True):
        seen = [metrics[f"{name}/{what}"] for what in ("loss", "error", "gap")]
        assert seen == pytest.approx([value, error, gap], rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(value for value, *_ in told), rel=1e-5)
    assert int(state.step) == 3
    assert {name: own.names for name, own in state.opt_state.items()} == dict.fromkeys(
        ("fit", "max", "min"), ("encoder", "f1", "f2")
    )
    for mode in ("jit", "pmap"):
        spread, _ = trained(objective, optimizer, data, mesh=mesh_of(4), mode=mode)
        close(spread.params, params, 1e-5)
        close(spread.state, state.state, 1e-5)


@pytest.mark.slow
def test_a_turn_moves_the_models_of_its_objective_alone():
    """Two models that have nothing to do with each other train as each would by itself, weight decay and all."""
    rng = np.random.default_rng(2)
    data = [{"image": np.float32(rng.normal(size=(8, H))), "label": rng.integers(0, C, 8)} for _ in range(4)]
    optimizers = {
        "f1": optax.adamw(0.1, weight_decay=0.1),
        "f2": optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation(),
    }
    terms = {model.name: jt.classification(model) + 0.1 * jt.l2(only=model.name) for model in (F1, F2)}
    pair = jt.alternate(*(jt.Turn(name, terms[name], optimizers[name]) for name in terms))
    together, metrics = trained(*pair, data)
    for name, objective in terms.items():
        alone, own = trained(objective, optimizers[name], data)
        close({name: together.params[name]}, alone.params, 1e-6)
        for metric, value in own.items():
            assert metrics[f"{name}/{metric}"] == pytest.approx(value, rel=1e-6)
    told = jt.evaluate(pair[0], together, data[:2])
    assert told["f1/accuracy"] == jt.evaluate(terms["f1"], together, data[:2])["accuracy"]


def drawing(ctx_draws):
    def loss(outputs, params, state, batch, ctx):
        drawn = jax.random.normal(ctx.shared_key("draw"))
        ctx_draws.append(ctx.step)
        return jnp.sum(jnp.square(params["f1"]["w"])), state, {"draw": jt.Mean(drawn, jnp.ones(()))}

    return jt.Objective("", (jt.Forward.of(F1),), loss)


@pytest.mark.slow
def test_draws_differ_by_turn_repetition_and_step_and_one_objective_may_have_several_turns():
    batch, objective = {"image": np.zeros((2, H), np.float32)}, drawing([])
    seen = []
    for repeat in (1, 2):
        both = [jt.Turn(name, objective, optax.sgd(0.1), repeat) for name in ("a", "b")]
        for count in (1, 2):
            _, metrics = trained(*jt.alternate(*both), [batch] * count)
            seen += [metrics["a/draw"], metrics["b/draw"]]
    seen.append(trained(objective, optax.sgd(0.1), [batch])[1]["draw"])
    assert len(set(seen)) == len(seen)


@pytest.mark.slow
def test_a_run_of_turns_is_recorded_and_resumes_to_the_same_bits(tmp_path):
    data = batches(6)

    def run(out, steps, first):
        objective, optimizer = jt.alternate(first, *turns()[1:])
        return jt.fit(objective, optimizer, data, steps=steps, out=out, save_every=1, log_every=2, progress=False)

    rated = jt.Turn("fit", 1.0 * two_heads(1, 0), optax.inject_hyperparams(optax.adam)(learning_rate=0.02))
    run(tmp_path / "cut", 3, rated)
    resumed, whole = run(tmp_path / "cut", 6, rated), run(tmp_path / "whole", 6, rated)
    for got, want in zip(jax.tree.leaves(resumed.state[2:]), jax.tree.leaves(whole.state[2:]), strict=True):
        np.testing.assert_array_equal(got, want)
    record = whole.history[-1]
    assert record["train/learning_rate/fit"] == pytest.approx(0.02)
    assert {"train/gradient_norm/max", "train/min/gap", "train/loss"} <= record.keys()
    for other in (
        jt.Turn("fit", two_heads(2, 0), rated.optimizer),
        jt.Turn("fit", rated.objective, rated.optimizer, 2),
    ):
        with pytest.raises(jt.InputError, match="another configuration"):
            run(tmp_path / "whole", 6, other)


def quadratic():
    """½ Σ_i mean-square of three columns of very different scale: a plain step of any one size fails."""

    def init(key, x):
        return {"params": {"w": jnp.ones(3)}}

    def apply(variables, x, *, train, key):
        return {"prediction": x @ variables["params"]["w"]}, {}

    model = jt.Model(init, apply)
    forward = jt.Forward.of(model)

    def loss(outputs, params, state, batch, ctx):
        value = ctx.mean(0.5 * jnp.square(outputs[forward]["prediction"] - batch["value"]))
        return value.value, state, {"error": value}

    rng = np.random.default_rng(3)
    x = np.float32(rng.normal(size=(8, 3)) * [10, 1, 0.3])
    want = np.float32([0.5, -2, 3])
    return jt.Objective("", (forward,), loss), {"image": x, "value": x @ want}, want


@pytest.mark.parametrize("place", ["one device", pytest.param("pmap", marks=pytest.mark.slow)])
def test_line_searches_get_value_gradient_and_function(place, mesh_of):
    objective, batch, want = quadratic()
    options = {} if place == "one device" else {"mesh": mesh_of(4), "mode": "pmap"}
    state, metrics = trained(objective, optax.lbfgs(), [batch] * 20, **options)
    np.testing.assert_allclose(state.params["model"]["w"], want, atol=2e-3)
    assert metrics["loss"] < 1e-6
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=30, decrease_factor=0.5)
    optimizer = optax.chain(optax.sgd(1.0), search)  # steps of 1 make it grow
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer, **options)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.all(np.diff(losses) < 0)
    assert losses[-1] < losses[0] / 5


@pytest.mark.slow
def test_line_searches_in_turns_and_an_identity_of_theirs(tmp_path):
    objective, batch, want = quadratic()
    pair = jt.alternate(jt.Turn("only", objective, optax.lbfgs(), repeat=4))
    fitted = jt.fit(*pair, [batch] * 5, steps=5, out=tmp_path, progress=False)
    np.testing.assert_allclose(fitted.state.params["model"]["w"], want, atol=2e-3)


def test_an_optimizer_gets_what_its_update_names():
    seen = {}

    def update(updates, state, params=None, *, value, value_fn):
        seen.update(value=value, again=value_fn(params))
        return jax.tree.map(jnp.zeros_like, updates), state

    objective, batch, _ = quadratic()
    named = optax.GradientTransformationExtraArgs(lambda params: {"seen": jnp.zeros(())}, update)
    trained(objective, named, [batch])
    assert seen.keys() == {"value", "again"}

    def offered(updates, state, params=None, *, value=None, grad_fn=None):
        seen.update(value=value, grad_fn=grad_fn)
        return jax.tree.map(jnp.zeros_like, updates), state

    trained(objective, optax.GradientTransformationExtraArgs(named.init, offered), [batch])
    assert callable(seen["grad_fn"])
    for wrap in (
        jt.optim.lookahead,
        jt.optim.loss_scaled,
        jt.optim.master_weights,
        lambda inner: jt.optim.by_path({".*": inner}),
        lambda inner: jt.optim.gradual_unfreeze(inner, [".*"], every=1),
    ):
        seen.clear()
        trained(objective, wrap(named), [batch])
        assert seen.keys() == {"value", "again"}
    for wrong, line in (
        (
            optax.chain(optax.clip(1.0), named),
            r"got an unexpected keyword argument 'grad\w*'.*; jt.optim passes on what",
        ),
        (optax.MultiSteps(named, 2).gradient_transformation(), "missing 2 required keyword-only arguments: 'value'"),
    ):
        with pytest.raises(jt.InputError, match=line):
            jt.init(objective, wrong, KEY, batch)


def test_schedules_are_evaluated_at_the_updates_of_their_own_turn():
    """One turn makes an update of two batches; after four of them the weights are 4 and 2."""
    batch = {"image": np.ones((8, H), np.float32), "label": batches(1)[0]["source"]["label"]}
    kept = [jt.classification(head(name)) for name in ("f1", "f2")]
    slow = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    counted = [(lambda step: 1.0 * step) * term for term in kept]
    pair = jt.alternate(jt.Turn("a", counted[0], optax.sgd(0.1)), jt.Turn("b", counted[1], slow))
    state, step = jt.init(*pair, KEY, batch), jt.train_step(*pair)
    for _ in range(4):
        state, _ = step(state, batch)
    for place in ({}, {"mode": "pmap"}):
        told = jt.evaluate(pair[0], state, [batch], **place)
        want = 4 * told["a/classification"] + 2 * told["b/classification"]
        assert told["loss"] == pytest.approx(want, rel=1e-5)


def test_nonsense_is_refused():
    data = batches(1)
    own = turns()
    for wrong, told in (
        ((), "one turn or more"),
        ((own[0], own[0]), r"a name of its own; got \['fit', 'fit'\]"),
        ((jt.Turn("", own[0].objective, own[0].optimizer),), "a name of its own"),
        ((own[0], jt.Refresh(5, lambda state: {})), "got a Refresh.*comes between steps"),
        ((jt.Turn("fit/loss", own[0].objective, own[0].optimizer),), "has none itself; got 'fit/loss'"),
        ((jt.Turn("a", own[0].objective, own[0].optimizer, 0),), "repeat a positive whole number"),
        ((jt.Turn("a", own[0].objective, jt.alternate(*own)[1]),), "alternates itself"),
        ((jt.Turn("a", own[0].optimizer, own[0].objective),), "expected an objective"),
        ((jt.Turn("a", own[0].objective, None),), "expected an optax optimiser"),
    ):
        with pytest.raises(jt.InputError, match=told):
            jt.alternate(*wrong)
    tasks = [jt.classification(ENCODER, output="features").named(name) for name in "ab"]

    def rule(gram, values, key, state):
        return values, values

    rule.init = jnp.ones
    with pytest.raises(jt.InputError, match="two balances keep what their rules remember as 'balance'"):
        jt.alternate(*(jt.Turn(name, jt.balance(tasks, rule), optax.sgd(0.1)) for name in "ab"))
    same = jt.balance(tasks, rule)
    jt.alternate(*(jt.Turn(name, same, optax.sgd(0.1)) for name in "ab"))  # one thing that both move
    with pytest.raises(jt.InputError, match="turn 'decay' would move nothing"):
        jt.init(*jt.alternate(own[0], jt.Turn("decay", jt.l2(), optax.sgd(0.1))), KEY, data[0])
    objective, optimizer = jt.alternate(*own)
    for pair, told in (
        ((objective, optax.adam(0.1)), "the optimiser that jt.alternate gave with it"),
        ((objective + jt.l2(), optimizer), "add terms to the objectives of the turns"),
        ((objective, optax.chain(optimizer)), "the optimiser that jt.alternate gave with it"),
        ((own[0].objective, optax.chain(optimizer)), "jt.init"),
    ):
        with pytest.raises(jt.InputError, match=told):
            jt.init(*pair, KEY, data[0])
    with pytest.raises(jt.InputError, match="add terms to the objectives"):
        jt.train_step(objective.named("x"), optimizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda objective: 2 * objective,
        lambda objective: objective + jt.l2(),
        lambda objective: objective.named("x"),
        jt.together,
        lambda objective: jt.balance([objective, objective.named("x")], jt.multitask.pcgrad),
    ],
    ids=["scaled", "added to", "named", "together", "balanced"],
)
def test_the_objective_of_turns_is_no_plain_sum(change):
    """What is made of it would train all turns at once, by one optimiser, which nobody asked for."""
    objective, _ = jt.alternate(*turns())
    with pytest.raises(jt.InputError, match="change, scale or add to the objectives of the turns"):
        jt.init(change(objective), optax.sgd(0.1), KEY, batches(1)[0])
