"""Chains from PyTorch: its own derivatives as the oracle, its weights shared, what is not supported refused by name."""

import copy

import numpy as np
import pytest
from network_problems import targets, unit_vectors

from ddnref import curvature, networks
from ddnref.reference import network_ggn

pytestmark = pytest.mark.framework("torch")
torch = pytest.importorskip("torch")
nn = torch.nn


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def second(f):
    """The Hessian; reverse over reverse, because forward mode warns on import."""
    return torch.func.jacrev(torch.func.jacrev(f))


def autograd(module, criterion, x, t):
    """Gradient, Hessian and Gauss–Newton matrix by PyTorch, and the parameters' shapes."""
    params = trained(module)
    sizes = [p.numel() for p in params.values()]

    def call(theta):
        parts = {n: q.reshape(p.shape) for (n, p), q in zip(params.items(), torch.split(theta, sizes), strict=True)}
        return torch.func.functional_call(module, parts, (x,))

    theta = torch.cat([p.detach().ravel() for p in params.values()])
    loss = lambda z: criterion(call(z), t)
    y, j = call(theta), torch.func.jacrev(call)(theta)
    curved = second(lambda y: criterion(y, t))(y)
    size = len(theta)
    j = j.reshape(-1, size)
    ggn = j.mT @ curved.reshape(len(j), len(j)) @ j
    return torch.func.grad(loss)(theta), second(loss)(theta), ggn


def matrix(product, chain, x, t):
    size = sum(p.numel() for p in chain.params)
    vectors = unit_vectors([p.numpy() for p in chain.params])
    return torch.cat([a.reshape(size, -1) for a in product(x, t, [torch.from_numpy(v) for v in vectors])], dim=1)


def sequential(activation, bias=True):
    return nn.Sequential(nn.Linear(4, 5, bias), activation, nn.Linear(5, 3), activation, nn.Linear(3, 3, bias)).double()


def network(name):
    torch.manual_seed(0)
    plain = {
        "relu": nn.ReLU(), "leaky": nn.LeakyReLU(0.2), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "gelu": nn.GELU(),
        "softplus": nn.Softplus(), "gelu tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "identity": nn.Identity(),
    }  # fmt: skip
    if name in plain:
        return sequential(plain[name], bias=name != "tanh"), torch.randn(5, 4, dtype=torch.float64)
    image = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    if name == "convolution":
        body = [nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)), nn.Tanh(), nn.Conv2d(3, 2, 3, padding="same"), nn.GELU()]
        module = nn.Sequential(nn.Sequential(*body), nn.Flatten(), nn.Sigmoid(), nn.Linear(24, 3))
    else:
        body = [nn.Conv2d(2, 2, 2, bias=False), nn.ReLU(), nn.Conv2d(2, 3, 2, 2, padding="valid"), nn.Dropout(0.5)]
        module = nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
        module[5].requires_grad_(False)
    return module.double(), image


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
@pytest.mark.parametrize(
    "name",
    ["relu", "leaky", "tanh", "sigmoid", "gelu", "softplus", "gelu tanh", "silu", "identity", "convolution", "frozen"],
)
def test_against_autograd(name, kind, reduction, rng):
    module, x = network(name)
    criterion = kind(reduction=reduction)
    chain = networks.Chain.from_torch(module, loss=criterion)
    t = torch.from_numpy(targets(rng, "cross_entropy" if kind is nn.CrossEntropyLoss else "mse", len(x), 3))
    g, h, ggn = autograd(module, criterion, x, t)
    assert abs(chain.loss(x, t) - criterion(module(x), t).detach()) <= 1e-13
    ours = torch.cat([a.ravel() for a in chain.gradient(x, t)])
    assert torch.max(torch.abs(ours - g)) <= 1e-13 * torch.max(torch.abs(g))
    assert torch.max(torch.abs(matrix(chain.hvp, chain, x, t) - h)) <= 1e-12 * torch.max(torch.abs(h))
    assert torch.max(torch.abs(matrix(chain.ggnvp, chain, x, t) - ggn)) <= 1e-12 * torch.max(torch.abs(ggn))


def test_weights_are_shared_and_nothing_is_recorded(rng):
    module, x = network("convolution")
    t = torch.from_numpy(rng.integers(0, 3, len(x)))
    chain = networks.Chain.from_torch(module)
    assert [p.data_ptr() for p in chain.params] == [p.data_ptr() for p in module.parameters()]
    for arrays in (chain.params, chain.gradient(x, t), chain.hvp(x, t, chain.params)):
        assert not any(a.requires_grad for a in arrays)
    before = chain.loss(x, t)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    nn.CrossEntropyLoss()(module(x), t).backward()
    optimiser.step()
    assert chain.loss(x, t) < before
    assert abs(chain.loss(x, t) - nn.CrossEntropyLoss()(module(x), t)) <= 1e-14


def test_recorded_tensors_are_refused():
    module, x = network("relu")
    with pytest.raises(TypeError, match=r"params\[0\] requires grad.*detach"):
        networks.Chain.from_arrays(list(module.parameters()))
    with pytest.raises(TypeError, match="x requires grad"):
        networks.Chain.from_torch(module).output(x.requires_grad_())


def test_frozen_parameters_do_not_appear():
    module, _ = network("frozen")
    chain = networks.Chain.from_torch(module)
    assert [p.data_ptr() for p in chain.params] == [p.data_ptr() for p in trained(module).values()]
    assert sum(isinstance(layer, networks.Frozen) for layer in chain.layers) == 1
    module[5].bias.requires_grad_(True)
    with pytest.raises(TypeError, match=r"'5'.*frozen together"):
        networks.Chain.from_torch(module)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm1d(3), "BatchNorm1d"),
        (nn.MaxPool2d(2), "MaxPool2d"),
        (nn.Flatten(0), "start_dim=0"),
        (nn.Conv2d(2, 2, 2, groups=2), "one group"),
        (nn.Conv2d(2, 2, 2, dilation=2), "no dilation"),
        (nn.Conv2d(2, 2, 2, padding=1, padding_mode="reflect"), "zeros"),
        (nn.Conv2d(2, 2, 2, padding="same"), "unequal sides"),
        (nn.Dropout(0.5), "module.eval"),
        (nn.Softplus(beta=2), "beta=1"),
        (nn.Softplus(threshold=0.1), "threshold of at least 20"),
        (nn.ELU(), "ELU"),
    ],
)
def test_unsupported_modules_are_named(module, message):
    with pytest.raises(TypeError, match=rf"module '1\.0'.*{message}"):
        networks.Chain.from_torch(nn.Sequential(nn.Linear(3, 3), nn.Sequential(module)))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["", "0", "1", "1.0"])
def test_hooks_are_refused(path, register):
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 2)))
    hook = getattr(module.get_submodule(path), register)(lambda *given: None)
    with pytest.raises(TypeError, match=rf"(?s)module '{path}',.*_{register.removeprefix('register_')}s"):
        networks.Chain.from_torch(module)
    hook.remove()
    assert len(networks.Chain.from_torch(module).layers) == 2


def test_the_old_weight_norm_is_refused():
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = nn.utils.weight_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"module '0'.*weight_norm"):
        networks.Chain.from_torch(nn.Sequential(normed))


def test_what_else_is_refused():
    module, _ = network("relu")
    tied = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"module '2'.*shares a weight"):
        networks.Chain.from_torch(nn.Sequential(tied, nn.Tanh(), tied))
    with pytest.raises(TypeError, match=r"module is a Linear, expected a torch\.nn\.Sequential"):
        networks.Chain.from_torch(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"loss is a L1Loss.*torch\.nn\.MSELoss"):
        networks.Chain.from_torch(module, loss=nn.L1Loss())
    with pytest.raises(ValueError, match="reduction is 'sum', but"):
        networks.Chain.from_torch(module, loss=nn.MSELoss(), reduction="sum")
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\).*divides by their number"):
        networks.Chain.from_torch(module, loss=nn.BCEWithLogitsLoss(torch.ones(5, 3)))
    with pytest.raises(ValueError, match="reduction is 'none'"):
        networks.Chain.from_torch(module, loss=nn.MSELoss(reduction="none"))
    assert networks.Chain.from_torch(module, loss="mse", reduction="sum").scale(5) == 1


def test_activations_go_where_they_belong():
    layers = [nn.Linear(3, 3), nn.Dropout(0.0), nn.Tanh(), nn.ReLU(), nn.Identity()]
    chain = networks.Chain.from_torch(nn.Sequential(*layers, nn.Linear(3, 2)))
    assert [type(z).__name__ for z in chain.layers] == ["Dense", "Elementwise", "Dense"]
    assert [getattr(z, "activation", None) for z in chain.layers] == ["tanh", "relu", "identity"]
    x = torch.randn(4, 3)
    expected = nn.Sequential(*layers, nn.Linear(3, 2))
    expected[-1].load_state_dict({"weight": chain.params[2], "bias": chain.params[3]})
    assert torch.max(torch.abs(chain.output(x) - expected(x))) <= 1e-6
    assert np.all([p.dtype == torch.float32 for p in chain.params])


# --- the chain follows its module ---------------------------------------------------------------------------------


def double(*sizes):
    return nn.Sequential(nn.Linear(*sizes[:2]), nn.LeakyReLU(0.1), nn.Linear(*sizes[1:])).double()


def replaced_parameter(module, loss):
    module[-1].weight = nn.Parameter(torch.randn_like(module[-1].weight))


def replaced_memory(module, loss):
    module[0].weight.data = torch.randn(5, 4, dtype=torch.float64)


def transposed_memory(module, loss):
    square = torch.randn(5, 5, dtype=torch.float64)
    module.insert(2, nn.Linear(5, 5).double())
    module[2].weight.data = square
    module[2].weight.data = square.T


def there_and_back(module, loss):
    module.float().double()


CHANGES = {
    "load_state_dict(assign=True)": lambda m, loss: m.load_state_dict(
        {name: torch.randn_like(p) for name, p in m.state_dict().items()}, assign=True
    ),
    "a new parameter": replaced_parameter,
    "other memory": replaced_memory,
    "other strides": transposed_memory,
    "float and back": there_and_back,
    "a new layer": lambda m, loss: m.__setitem__(0, nn.Linear(4, 5, bias=False).double()),
    "one layer more": lambda m, loss: m.append(nn.Tanh()),
    "a nested layer": lambda m, loss: m.__setitem__(1, nn.Sequential(nn.Linear(5, 5).double(), nn.Tanh())),
    "one layer less": lambda m, loss: m.__delitem__(1),
    "another activation": lambda m, loss: m.__setitem__(1, nn.Tanh()),
    "an option": lambda m, loss: setattr(m[1], "negative_slope", 0.7),
    "no bias": lambda m, loss: setattr(m[0], "bias", None),
    "frozen": lambda m, loss: m[0].requires_grad_(False),
    "class weights": lambda m, loss: setattr(loss, "weight", torch.rand(3, dtype=torch.float64)),
    "class weights in place": lambda m, loss: loss.weight.mul_(torch.tensor([1.0, 2.0, 3.0])),
    "an option of the loss": lambda m, loss: setattr(loss, "label_smoothing", 0.4),
    "the reduction": lambda m, loss: setattr(loss, "reduction", "sum"),
}
REFUSED = {
    "a hook": (lambda m: m[0].register_forward_hook(lambda *given: None), "_forward_hooks"),
    "training": (lambda m: m[1].train(), "module.eval"),
    "a parametrisation": (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "'0', ParametrizedLinear"),
    "half precision": (lambda m: m.half(), "float16"),
    "two precisions": (lambda m: m[0].float(), "params"),
    "an unknown layer": (lambda m: m.append(nn.LayerNorm(3).double()), "LayerNorm"),
    "a shared weight": (lambda m: m.append(m[2]), "shares a weight"),
    "layers that do not fit": (lambda m: m.__setitem__(2, nn.Linear(7, 3).double()), r"layers\[1\]"),
}


def agree(chain, module, criterion, x, t):
    loss = criterion(module(x), t)
    wanted = torch.autograd.grad(loss, list(trained(module).values()))
    assert abs(chain.loss(x, t) - loss.detach()) <= 1e-14 * abs(loss.detach())
    found = chain.gradient(x, t)
    assert all(torch.max(torch.abs(a - b)) <= 1e-14 for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(chain.params, trained(module).values(), strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_the_chain_follows(change):
    torch.manual_seed(0)
    module, x, t = double(4, 5, 3), torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    criterion = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))
    chain = networks.Chain.from_torch(module, loss=criterion)
    agree(chain, module, criterion, x, t)
    CHANGES[change](module, criterion)
    agree(chain, module, criterion, x, t)


@pytest.mark.parametrize("change", REFUSED)
def test_what_the_chain_cannot_follow_raises_each_time(change):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().eval()
    x, t = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    chain = networks.Chain.from_torch(module)
    other = chain.with_params(chain.params)
    do, says = REFUSED[change]
    do(module)
    uses = (
        lambda: chain.loss(x, t),
        lambda: chain.hvp(x, t, other.params),
        lambda: chain.params,
        lambda: chain.scale(6),
        lambda: curvature.ggn_eigvalsh(chain, x, t),
        lambda: curvature.hessian_factor(chain, x, t, damping=1.0),
    )
    for use in uses:
        with pytest.raises((TypeError, ValueError), match=says):
            use()
    assert torch.isfinite(other.loss(x, t))  # which follows nothing


@pytest.mark.parametrize("seed", range(5))
def test_the_chain_follows_any_order_of_changes(seed):
    """Functions of curvature as well, which read the chain's layers, loss and reduction by themselves."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(list(CHANGES)[:5] + list(CHANGES)[9:])
    module, x, t = double(4, 5, 3), torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, -100, 1, 0])
    criterion = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))
    chain = networks.Chain.from_torch(module, loss=criterion)
    for change in order:
        CHANGES[change](module, criterion)
        fresh = networks.Chain.from_torch(module, loss=criterion)
        for call in (
            curvature.ggn_eigvalsh,
            lambda c, *data: curvature.hessian_factor(c, *data, damping=3.0).slogdet(),
        ):
            for a, b in zip(call(chain, x, t), call(fresh, x, t), strict=True):
                assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        agree(chain, module, criterion, x, t)


def test_writing_in_place_reads_nothing_again():
    module, x = network("relu")
    chain = networks.Chain.from_torch(module)
    before = chain.layers
    module.load_state_dict(network("relu")[0].state_dict())
    optimiser = torch.optim.Adam(module.parameters())
    module(x).sum().backward()
    optimiser.step()
    assert chain.layers is before
    assert torch.equal(chain.output(x), module(x).detach())


def test_a_copy_of_a_chain_follows_its_own_copy_of_the_module():
    torch.manual_seed(0)
    module, x = double(4, 5, 3), torch.randn(6, 4, dtype=torch.float64)
    chain = networks.Chain.from_torch(module, loss=nn.CrossEntropyLoss())
    before, other = chain.output(x), copy.deepcopy(chain)
    replaced_parameter(module, None)
    assert torch.equal(other.output(x), before)
    assert torch.equal(chain.output(x), module(x).detach())


@pytest.mark.graphs
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_chain_follows():
    torch.manual_seed(0)
    module, x, t = double(4, 5, 3), torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    chain = networks.Chain.from_torch(module)
    compiled = torch.compile(lambda x, t: chain.gradient(x, t, throw=False), fullgraph=True, backend="eager")
    for _ in range(2):
        wanted = torch.autograd.grad(nn.CrossEntropyLoss()(module(x), t), list(module.parameters()))
        assert all(torch.max(torch.abs(a - b)) <= 1e-14 for a, b in zip(compiled(x, t), wanted, strict=True))
        replaced_memory(module, None)


# --- losses with options ------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
INDEX = torch.tensor([0, 1, 2, -100, 1])
CLASSES = INDEX.clamp(min=0)
SPREAD = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 2.0, 0.1], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1]]).double()
BINARY = SPREAD.clamp(max=1.0)
OPTIONS = {
    "weights": (lambda **o: nn.CrossEntropyLoss(WEIGHT, **o), CLASSES),
    "smooth": (lambda **o: nn.CrossEntropyLoss(label_smoothing=0.3, **o), CLASSES),
    "ignored": (lambda **o: nn.CrossEntropyLoss(**o), INDEX),
    "ignored class": (lambda **o: nn.CrossEntropyLoss(ignore_index=1, **o), CLASSES),
    "all": (lambda **o: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3, **o), INDEX),
    "all, a class": (lambda **o: nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=1.0, **o), CLASSES),
    "all, bytes": (lambda **o: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3, **o), CLASSES.to(torch.uint8)),
    "probabilities": (lambda **o: nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3, **o), SPREAD),
    "binary": (lambda **o: nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT.flip(0), **o), BINARY),
    "binary, one": (lambda **o: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double(), **o), BINARY),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS)
def test_losses_with_options_against_autograd(options, reduction):
    torch.manual_seed(1)
    make, t = OPTIONS[options]
    module, criterion, x = double(4, 5, 3), make(reduction=reduction), torch.randn(5, 4, dtype=torch.float64)
    chain = networks.Chain.from_torch(module, loss=criterion)
    theirs = t.to(torch.int64) if t.dtype == torch.uint8 else t  # PyTorch's second derivatives take no bytes
    g, h, ggn = autograd(module, criterion, x, theirs)
    size = torch.max(torch.abs(h))
    assert abs(chain.loss(x, t) - criterion(module(x), theirs).detach()) <= 1e-14
    assert torch.max(torch.abs(torch.cat([a.ravel() for a in chain.gradient(x, t)]) - g)) <= 1e-14
    assert torch.max(torch.abs(matrix(chain.hvp, chain, x, t) - h)) <= 1e-14 * size
    assert torch.max(torch.abs(matrix(chain.ggnvp, chain, x, t) - ggn)) <= 1e-14 * size
    # The Gram matrix and the factored Hessian take other ways; batches are weighted together, not one by one.
    w = torch.linalg.eigvalsh(network_ggn(chain, x, t)).flip(0)
    for data in ({"x": x, "t": t}, {"batches": [(x[:2], t[:2]), (x[2:], t[2:])]}):
        found = curvature.ggn_eigvalsh(chain, **data)
        assert torch.max(torch.abs(found - w[: len(found)])) <= 1e-14 * size
    solved, _ = curvature.hessian_solve(chain, x, t, chain.params, damping=3.0)
    vector = torch.cat([a.ravel() for a in chain.params])
    wanted = torch.linalg.solve(h + 3.0 * torch.eye(len(h), dtype=h.dtype), vector)
    assert torch.max(torch.abs(torch.cat([a.ravel() for a in solved]) - wanted)) <= 1e-13
    # Newton's step of the GGN, and gradients of single samples.
    step = curvature.ggn_damped_newton(chain, x, t, k=1, damping=3.0)
    e = torch.linalg.eigh(ggn)[1][:, -1]
    assert torch.max(torch.abs(torch.cat([a.ravel() for a in step]) + (e @ g) / (w[0] + 3.0) * e)) <= 1e-13
    weights = (
        t.new_ones(5).double() if chain.criterion.sample_weight is None else chain.criterion.sample_weight(x[:, :3], t)
    )
    total = weights.sum() if reduction == "mean" else 1.0
    each = chain.per_sample_gradients(x, t)
    assert all(torch.allclose(a.sum(0) / total, b, 0, 1e-14) for a, b in zip(each, chain.gradient(x, t), strict=True))


def test_the_mean_over_ignored_samples_alone_is_not_defined():
    module, x = network("relu")
    t = torch.full((len(x),), -100)
    assert torch.isnan(networks.Chain.from_torch(module, loss=nn.CrossEntropyLoss()).loss(x, t))
    chain = networks.Chain.from_torch(module, loss=nn.CrossEntropyLoss(reduction="sum"))
    assert chain.loss(x, t) == 0
    assert all(torch.all(a == 0) for a in chain.gradient(x, t))
