"""Random deep networks with their dense Hessians, and what is measured against those."""

from types import SimpleNamespace

import numpy as np

from ddnref import networks


def network(rng, n_layers, a, n, activation="tanh", bias=False, residual=False, gain=1.0, asarray=np.asarray):
    """A chain of width a and its data; residual blocks of one and two layers, nested at the end."""
    widths = [a] * n_layers + [3]
    dense = []
    for i in range(n_layers):
        weight = gain * rng.standard_normal((widths[i + 1], widths[i])) / widths[i] ** 0.5
        offset = asarray(0.1 * rng.standard_normal(widths[i + 1])) if bias else None
        dense.append(networks.Dense(asarray(weight), offset, activation if i < n_layers - 1 else "identity"))
    layers = dense
    if residual:
        inner, layers = dense[:-1], dense[-1:]
        if inner:
            layers = [networks.Residual(inner[-1:]), *layers]
        if len(inner) > 2:
            layers = [networks.Residual([*inner[-3:-1], layers[0]]), *layers[1:]]
        layers = [networks.Residual([layer]) for layer in inner[: -3 if len(inner) > 2 else -1]] + layers
    chain = networks.Chain(layers, "cross_entropy")
    return chain, asarray(rng.standard_normal((n, a))), asarray(rng.integers(0, 3, n))


def flatten(v):
    return np.concatenate([np.reshape(z, (z.shape[0], -1)) for z in v], axis=1)


def lists(rows, chain):
    """(k, p) rows as a list like the parameters."""
    found, start = [], 0
    for p in chain.params:
        found.append(rows[:, start : start + p.size].reshape(len(rows), *p.shape))
        start += p.size
    return found


def dense(chain, x, t, times="hvp"):
    """The matrix, by the network's own products: they share nothing with the expansion but the layers' derivatives."""
    p = sum(z.size for z in chain.params)
    h = flatten(getattr(chain, times)(x, t, lists(np.eye(p), chain)))
    return (h + h.T) / 2


def problem(*args, **options):
    chain, x, t = network(*args, **options)
    h = dense(chain, x, t)
    b = np.random.default_rng(7).standard_normal((1, len(h)))
    return SimpleNamespace(chain=chain, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=b)


def hard_shifts(chain, h):
    """Minus eigenvalues of the first layer's, the last layer's and all trailing diagonal blocks, none of H itself."""
    n_arrays = [2 if layer.bias is not None else 1 for layer in each_layer(chain)]
    sizes, params = [], iter(chain.params)
    for count in n_arrays:
        sizes.append(sum(next(params).size for _ in range(count)))
    starts = np.cumsum([0, *sizes])
    blocks = [h[: starts[1], : starts[1]], *(h[s:, s:] for s in starts[1:-1])]
    if len(sizes) == 1:
        return []
    chosen = blocks if len(blocks) <= 4 else [blocks[0], blocks[1], blocks[len(blocks) // 2], blocks[-1]]
    spectra = [np.linalg.eigvalsh(block) for block in chosen]
    shifts = [-w[np.argmax(np.abs(w))] for w in spectra] + [-w[len(w) // 3] for w in spectra]
    w = np.linalg.eigvalsh(h)
    return [float(s) for s in shifts if np.min(np.abs(w + s)) > 1e-12 * np.max(np.abs(w))]


def each_layer(part):
    for layer in part.layers:
        yield from each_layer(layer) if isinstance(layer, networks.Residual) else [layer]


def backward_error(q, damping, solution):
    x = flatten([z[None] for z in solution])[0]
    r = q.b[0] - q.h @ x - damping * x
    return np.linalg.norm(r) / (np.max(np.abs(q.w)) * np.linalg.norm(x) + np.linalg.norm(q.b))
