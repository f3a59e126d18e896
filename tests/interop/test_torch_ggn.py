"""The GGN of PyTorch modules by hooks, against explicit Jacobians and PyTorch's double vector-Jacobian products."""

import copy
import pickle

import numpy as np
import pytest

from ddnref import NonFiniteError, curvature, networks

pytestmark = pytest.mark.framework("torch")
torch = pytest.importorskip("torch")
nn = torch.nn

EXACT = 1e-12
N = 5


@pytest.fixture
def ggn():
    from ddnref.interop.torch import ggn

    return ggn


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- modules ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """An encoder block with PyTorch's attention, whose output weights no module call shows."""

    def __init__(self, d, batch_first=True):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, x):
        z = self.norm(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        return x + self.mlp(x)


class ViT(nn.Module):
    """Patches, a class token and positions as parameters of the outermost module, blocks, a head."""

    def __init__(self, d=6, block=Attention):
        super().__init__()
        self.patches = nn.Conv2d(1, d, 2, 2)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 5, d))
        self.blocks, self.head = nn.ModuleList([block(d), block(d)]), nn.Linear(d, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Residual(nn.Module):
    """Two convolutions with batch normalisation, in place activations, and a shortcut with a stride."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.one, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.two, self.norm_two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.act = nn.Softplus()

    def forward(self, x):
        z = self.norm(self.one(x))
        z = nn.functional.leaky_relu_(z, 0.1)
        return self.act(self.norm_two(self.two(z)) + self.shortcut(x))


def resnet():
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3, 1, 1), Residual(2, 2, 1), Residual(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        module(torch.randn(20, 1, 4, 4, dtype=torch.float64))  # statistics that are not 0 and 1
    return module


class Text(nn.Module):
    """Embeddings of tokens and of positions, a block, and a head whose weight may be that of the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.tokens, self.positions, self.block = nn.Embedding(7, 6), nn.Embedding(4, 6), Attention(6)
        self.head, self.tied = nn.Linear(6, 7, bias=False), tied
        if tied == "module":
            self.head.weight = self.tokens.weight

    def forward(self, i):
        x = self.block(self.tokens(i) + self.positions(torch.arange(i.shape[1])))
        return nn.functional.linear(x, self.tokens.weight) if self.tied == "function" else self.head(x)


class Branches(nn.Module):
    """Control flow that depends on data, a layer that is called several times, and a parameter outside of layers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        z = self.norm(self.a(x))
        z = self.b(z) if z[0, 0] > 0 else torch.tanh(self.b(-z))
        for _ in range(1 + int(z.abs().sum()) % 2):
            z = torch.tanh(self.b(z))
        return self.c(z) * self.scale


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Attention(4, batch_first=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(x.transpose(0, 1))).sum(0)


class Windows(nn.Module):
    """Samples are merged with windows, and linear maps see the axis of both."""

    def __init__(self):
        super().__init__()
        self.conv, self.map, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, 4), nn.Linear(8, 3)

    def forward(self, x):
        n = len(x)
        windows = x.unfold(2, 2, 2).reshape(n * 2, 1, 4, 2)
        z = self.map(torch.tanh(self.conv(windows)).sum((2, 3)))
        return self.head(torch.tanh(z).reshape(n, 8))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, dilation=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2, padding="same"),
        nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3, padding="same"), nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(2), nn.Conv1d(2, 1, 3), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def images():
    return torch.randn(N, 1, 4, 4, dtype=torch.float64)


def sequences():
    return torch.randn(N, 3, 4, dtype=torch.float64)


def vectors():
    return torch.randn(N, 4, dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def twice():
    inner = nn.Linear(4, 4)
    return nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(4, 3))


MODULES = {
    "mlp": (mlp, vectors),
    "vit": (ViT, images),
    "resnet": (resnet, images),
    "convolutions": (convolutions, images),
    "branches": (Branches, vectors),
    "sequence first": (SequenceFirst, sequences),
    "windows": (Windows, images),
    "recurrent": (Recurrent, sequences),
    "weight norm": (weight_norm, vectors),
    "called twice": (twice, vectors),
}


def made(name):
    make, data = MODULES[name]
    x, module = data(), make().double()
    with torch.no_grad():
        module(x)  # lazy layers learn their shapes
    return module.eval(), x, torch.arange(N) % 3


# --- oracles --------------------------------------------------------------------------------------------------------


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def math_attention():
    return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)


def dense(module, x, t, loss=nn.functional.cross_entropy):
    """The GGN as a matrix, row by row of the Jacobian, and the parameters' gradient."""
    params = list(trained(module).values())
    y = module(x)
    flat = y.detach().reshape(-1, y.shape[-1]).requires_grad_()
    value = loss(flat, t.reshape(-1) if t.ndim == y.ndim - 1 else t.reshape(flat.shape))
    (slope,) = torch.autograd.grad(value, flat, create_graph=True)
    slope = slope.reshape(-1)
    hessian = torch.stack([torch.autograd.grad(s, flat, retain_graph=True)[0].reshape(-1) for s in slope])
    rows = []
    for y_i in y.reshape(-1):
        bars = torch.autograd.grad(y_i, params, retain_graph=True, allow_unused=True)
        bars = [torch.zeros_like(p) if g is None else g for p, g in zip(params, bars, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in bars]))
    j = torch.stack(rows)
    return j.mT @ hessian.detach() @ j, slope.detach() @ j


def flat(answer):
    return torch.cat([a.reshape(len(a), -1) for a in answer.values()], 1)


def residual(module, x, w, v):
    """``max |G v − λ v| / λ`` by two vector-Jacobian products and the softmax's Hessian."""
    params = trained(module)
    found = []
    with math_attention():
        for i in range(len(w)):
            y = module(x)
            u = torch.zeros_like(y, requires_grad=True)
            bars = torch.autograd.grad(y, params.values(), u, create_graph=True)
            along = sum((a * v[name][i]).sum() for name, a in zip(params, bars, strict=True))
            (y_dot,) = torch.autograd.grad(along, u)
            p = torch.softmax(y.detach(), -1)
            curved = (p * y_dot - p * (p * y_dot).sum(-1, keepdim=True)) / len(x)
            product = torch.autograd.grad(module(x), params.values(), curved)
            gap = torch.cat([(g - w[i] * v[name][i]).reshape(-1) for name, g in zip(params, product, strict=True)])
            found.append((gap.norm() / w[i]).item())
    return max(found)


# --- against the dense matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_everything_against_the_dense_matrix(name, ggn):
    module, x, t = made(name)
    before = copy.deepcopy(module.state_dict())
    g, slope = dense(module, x, t)
    values, directions = torch.linalg.eigh(g)
    network = ggn(module, "cross_entropy")
    w = curvature.ggn_eigvalsh(network, x, t)
    k = len(w)
    assert k == min(len(g), 2 * N)
    assert (w - values.flip(0)[:k]).abs().max() <= EXACT * w[0]
    w, v = curvature.ggn_eigh(network, x, t, k=3)
    assert list(v) == list(trained(module)) == list(network.names)
    assert [a.shape for a in v.values()] == [(3, *p.shape) for p in trained(module).values()]
    assert ((flat(v) @ directions.flip(1)[:, :3]).abs() - torch.eye(3, dtype=g.dtype)).abs().max() <= 1e-9
    step = curvature.ggn_damped_newton(network, x, t, k=k - 1, damping=0.1)
    top, e = values.flip(0)[: k - 1], directions.flip(1)[:, : k - 1]
    expected = -e @ ((e.mT @ slope) / (top + 0.1))
    assert (flat({n: s[None] for n, s in step.items()})[0] - expected).abs().max() <= 1e-9 * expected.abs().max()
    derivatives = curvature.ggn_directional_derivatives(network, x, t, k=2)
    assert (derivatives.second.mean(0) - derivatives.w).abs().max() <= EXACT * w[0]
    assert (derivatives.first.mean(0).abs() - (e[:, :2].mT @ slope).abs()).abs().max() <= EXACT * slope.norm()
    # Nothing is left behind: no hook, no attribute, no gradient, no changed value.
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    check_untouched(module)


def check_untouched(module):
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "forward" not in part.__dict__
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", ["vit", "resnet", "attention"])
def test_eigenpairs_by_double_vjp(name, ggn):
    """The bar: ``|G v − λ v| / λ <= 1e-13``."""
    if name == "attention":
        module, x = nn.Sequential(Attention(4), nn.Flatten(), nn.Linear(12, 3)).double().eval(), sequences()
        t = torch.arange(N) % 3
    else:
        module, x, t = made(name)
    w, v = curvature.ggn_eigh(ggn(module), x, t, k=3)  # smaller ones have an error of eps * λ_1
    assert residual(module, x, w, v) <= 1e-13


@pytest.mark.parametrize(("loss", "tied"), [
    ("cross_entropy", None), ("cross_entropy", "module"), ("cross_entropy", "function"), ("mse", "module"),
    ("bce", None), ("weighted", None),
])  # fmt: skip
def test_outputs_at_positions(loss, tied, ggn):
    """Losses of (N, T, C), means over all positions; ignored ones do not count."""
    module, tokens = Text(tied).double().eval(), torch.randint(0, 7, (3, 4))
    t = torch.randint(0, 7, (3, 4))
    theirs, ours = nn.functional.cross_entropy, "cross_entropy"
    if loss == "weighted":
        t[0, :2] = -100
        ours = nn.CrossEntropyLoss(weight=torch.rand(7, dtype=torch.float64) + 0.5, label_smoothing=0.1)
        theirs = ours
    elif loss != "cross_entropy":
        t, ours = torch.rand(3, 4, 7, dtype=torch.float64), loss
        theirs = nn.functional.mse_loss if loss == "mse" else nn.functional.binary_cross_entropy_with_logits
    g, slope = dense(module, tokens, t, theirs)
    w = curvature.ggn_eigvalsh(ggn(module, ours), tokens, t)
    assert (w - torch.linalg.eigvalsh(g).flip(0)[: len(w)]).abs().max() <= EXACT * w[0]
    step = curvature.ggn_damped_newton(ggn(module, ours), tokens, t, k=4, damping=1.0)
    assert torch.cat([s.reshape(-1) for s in step.values()]) @ slope < 0
    if tied == "module":
        assert "head.weight" not in step


@pytest.mark.parametrize("name", ["vit", "mlp", "resnet"])
def test_batches_groups_and_samples(name, ggn):
    module, x, t = made(name)
    network = ggn(module)
    batches = [(x[:2], t[:2]), (x[2:], t[2:])]
    whole = curvature.ggn_eigvalsh(network, x, t)
    assert (curvature.ggn_eigvalsh(network, batches=batches) - whole).abs().max() <= EXACT * whole[0]
    # Two processes: what one sends to the other is the network, and a state.
    reducer, other = (curvature.ggn_reducer(pickle.loads(pickle.dumps(network))) for _ in range(2))
    first = pickle.loads(pickle.dumps(other.update(other.init(), *batches[0])))
    ggn_ = reducer.finalise(reducer.merge(first, reducer.update(reducer.init(2), *batches[1])))
    assert (curvature.ggn_eigvalsh(ggn_) - whole).abs().max() <= EXACT * whole[0]
    w, v = curvature.ggn_eigh(ggn_, k=2)
    assert list(v) == list(network.names)
    # A group by name is the diagonal block.
    g, _ = dense(module, x, t)
    sizes = [p.numel() for p in trained(module).values()]
    chosen = [network.names[-1], network.names[1]]
    masks = [torch.full((size,), n in chosen) for n, size in zip(network.names, sizes, strict=True)]
    block = g[torch.cat(masks)][:, torch.cat(masks)]
    ((w, v),) = curvature.ggn_eigh(network, x, t, k=2, groups=[chosen])
    assert list(v) == [n for n in network.names if n in chosen]
    assert (w - torch.linalg.eigvalsh(block).flip(0)[:2]).abs().max() <= EXACT * w[0]
    some = curvature.ggn_eigvalsh(network, x, t, subsampling=[4, 1])
    assert (some - curvature.ggn_eigvalsh(network, x[[1, 4]], t[[1, 4]])).abs().max() <= EXACT * some[0]


def test_a_sequential_is_its_chain(ggn):
    """Every option gives what the chain of the same module gives."""
    module, x, t = made("mlp")
    chain, network = networks.Chain.from_torch(module), ggn(module)
    for options in ({}, {"mc_samples": 3, "seed": 4}, {"subsampling": [0, 3]}):
        a, b = (curvature.ggn_eigvalsh(each, x, t, **options) for each in (chain, network))
        assert (a - b).abs().max() <= EXACT * a[0]
    step = curvature.ggn_damped_newton(chain, x, t, k=4, damping=0.1)
    named = curvature.ggn_damped_newton(network, x, t, k=4, damping=0.1)
    assert all((a - b).abs().max() <= 1e-10 for a, b in zip(step, named.values(), strict=True))


def test_single_precision(ggn):
    module, x, t = made("vit")
    exact = curvature.ggn_eigvalsh(ggn(module), x, t)
    single = curvature.ggn_eigvalsh(ggn(module.float()), x.float(), t)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() <= 1e-5 * exact[0]


def test_the_module_is_followed(ggn):
    module, x, t = made("mlp")
    network = ggn(module)
    before = curvature.ggn_eigvalsh(network, x, t)
    with torch.no_grad():
        module[2].weight.mul_(2)
    module[0].bias.requires_grad_(False)
    assert network.names == ("0.weight", "2.weight", "2.bias")
    after = curvature.ggn_eigvalsh(network, x, t)
    g, _ = dense(module, x, t)
    assert (after - torch.linalg.eigvalsh(g).flip(0)[: len(after)]).abs().max() <= EXACT * after[0]
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_modes_without_gradients(mode, ggn):
    module, x, t = made("vit")
    expected = curvature.ggn_eigvalsh(ggn(module), x, t)
    with mode():
        found = curvature.ggn_eigvalsh(ggn(module), x + 0, t)
    assert (found - expected).abs().max() <= EXACT * expected[0]


# --- which parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "0.weight 0.bias"])
def test_frozen_parameters_are_left_out(frozen, ggn):
    module, x, t = made("mlp")
    for name in frozen.split():
        module.get_parameter(name).requires_grad_(False)
    g, _ = dense(module, x, t)
    w, v = curvature.ggn_eigh(ggn(module), x, t, k=2)
    assert not set(frozen.split()) & set(v)
    assert (w - torch.linalg.eigvalsh(g).flip(0)[:2]).abs().max() <= EXACT * w[0]


def test_parameters_without_use_have_zeros(ggn):
    module, x, t = made("mlp")
    module.spare = nn.Linear(3, 3).double()
    module.forward = lambda x: module[2](module[1](module[0](x)))
    _, v = curvature.ggn_eigh(ggn(module), x, t, k=2)
    assert list(v)[-2:] == ["spare.weight", "spare.bias"]
    assert v["spare.weight"].shape == (2, 3, 3)
    assert not v["spare.weight"].any()


def test_columns_of_the_wrong_part_are_found(ggn, monkeypatch):
    """A mutation: where the columns of a part are wrong, the comparison notices, and the whole graph is used."""
    from ddnref.interop import _torch_ggn

    module, x, t = made("vit")
    expected = curvature.ggn_eigvalsh(ggn(module), x, t)
    right, calls = _torch_ggn._by_sample, []

    def wrong(call, deltas, own):
        calls.append(call)
        return {name: 1.01 * columns for name, columns in right(call, deltas, own).items()}

    monkeypatch.setattr(_torch_ggn, "_by_sample", wrong)
    found = curvature.ggn_eigvalsh(ggn(module), x, t)
    assert calls
    assert (found - expected).abs().max() <= EXACT * expected[0]
    monkeypatch.setattr(_torch_ggn._Graph, "_disagreeing", lambda *_: [])
    assert (curvature.ggn_eigvalsh(ggn(module), x, t) - expected).abs().max() >= 1e-5 * expected[0]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_statistics_of_the_batch_are_refused_by_name(ggn):
    module, x, t = made("resnet")
    with pytest.raises(ValueError, match=r"BatchNorm2d '1.norm', which computes the mean and variance.*eval\(\)"):
        curvature.ggn_eigvalsh(ggn(module.train()), x, t)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double().eval()
    with pytest.raises(ValueError, match=r"BatchNorm1d '1'.*track_running_stats=True"):
        curvature.ggn_eigvalsh(ggn(module), vectors(), t)
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    with pytest.raises(ValueError, match=r"Dropout '1', which drops units at random.*eval\(\)"):
        curvature.ggn_eigvalsh(ggn(module), vectors(), t)
    assert len(curvature.ggn_eigvalsh(ggn(module.eval()), vectors(), t)) == 10


class Coupled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 3), nn.Linear(3, 3), kind

    def forward(self, x):
        y = self.first(x)
        if self.kind == "mean":
            y = y - y.mean(0)
        if self.kind == "roll":
            y = torch.roll(y, 1, 0)
        return self.last(y)


@pytest.mark.parametrize("kind", ["mean", "roll"])
def test_samples_that_depend_on_each_other_are_refused(kind, ggn):
    with pytest.raises(ValueError, match="Samples depend on each other behind Linear 'first'"):
        curvature.ggn_eigvalsh(ggn(Coupled(kind).double()), vectors(), torch.arange(N) % 3)


def test_hooks_do_not_outlive_an_exception(ggn):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(4, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            z = self.b(self.a(x)) * self.scale
            if len(x) > 3:
                raise KeyError("of the user")
            return z

    module = Failing().double()
    with pytest.raises(KeyError, match="of the user"):
        curvature.ggn_eigvalsh(ggn(module), vectors(), torch.arange(N) % 3)
    check_untouched(module)


@pytest.mark.parametrize(("module", "error", "message"), [
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (1, 1, 3))), ValueError, r"shape \(5, 1, 1, 3\) for N = 5"),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), ValueError, r"returns shape \(15,\)"),
    (lambda: nn.LSTM(4, 3), TypeError, "returns a tuple"),
    (lambda: nn.Sequential(nn.Linear(4, 1)), ValueError, "C = 1 output"),
])  # fmt: skip
def test_outputs_that_do_not_fit(module, error, message, ggn):
    with pytest.raises(error, match=message):
        curvature.ggn_eigvalsh(ggn(module().double()), vectors(), torch.zeros(N, dtype=torch.int64))


def test_other_bad_input(ggn):
    module, x, t = made("mlp")
    with pytest.raises(TypeError, match=r"module is a list, expected a torch.nn.Module"):
        ggn([module])
    with pytest.raises(TypeError, match="loss is a L1Loss"):
        ggn(module, nn.L1Loss())
    with pytest.raises(ValueError, match="none of its parameters requires grad"):
        ggn(copy.deepcopy(module).requires_grad_(False))
    mixed = copy.deepcopy(module)
    mixed[0].float()
    with pytest.raises(TypeError, match=r"2\.weight has dtype torch.float64"):
        ggn(mixed)
    with pytest.raises(ValueError, match="names the parameter 'nothing'"):
        curvature.ggn_eigvalsh(ggn(module), x, t, groups=[["nothing"]])
    with pytest.raises(ValueError, match="out of range"):
        curvature.ggn_eigvalsh(ggn(module), x, t + 3)
    assert torch.isnan(curvature.ggn_eigvalsh(ggn(module), x, t + 3, throw=False)).all()
    x[2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1 of 5 samples \(numbers 2\)"):
        curvature.ggn_eigvalsh(ggn(module), x, t)
    with pytest.raises(TypeError, match=r"interop\.torch\.ggn"):
        curvature.ggn_eigvalsh(module, x, t)
    tokens, text = torch.randint(0, 7, (3, 4)), Text(None).double()
    with pytest.raises(ValueError, match=r"t has shape \(3, 7\), expected \(3, 4\) or \(3, 4, 7\)"):
        curvature.ggn_eigvalsh(ggn(text), tokens, torch.zeros(3, 7, dtype=torch.int64))
    assert repr(ggn(module)) == "ModuleGgn(Sequential; mean of cross_entropy; 43 parameters, torch.float64)"


def test_reductions(ggn):
    module, x, t = made("mlp")
    mean, total = (curvature.ggn_eigvalsh(ggn(module, reduction=r), x, t) for r in ("mean", "sum"))
    assert np.allclose(N * mean, total)
    module_loss = curvature.ggn_eigvalsh(ggn(module, nn.CrossEntropyLoss(reduction="sum")), x, t)
    assert np.allclose(module_loss, total)
