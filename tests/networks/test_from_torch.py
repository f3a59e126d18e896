"""Chains from PyTorch: its own derivatives as the oracle, its weights shared, what is not supported refused by name."""

import numpy as np
import pytest
from network_problems import targets, unit_vectors

from ddnref import networks

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
    with pytest.raises(ValueError, match="label_smoothing"):
        networks.Chain.from_torch(module, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(ValueError, match="ignore_index set"):
        networks.Chain.from_torch(module, loss=nn.CrossEntropyLoss(ignore_index=1))
    with pytest.raises(ValueError, match="weight set"):
        networks.Chain.from_torch(module, loss=nn.CrossEntropyLoss(torch.ones(3)))
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
