"""Grape, MUSE and M3Care, each by its mechanism, edge by edge and sample by sample in float64."""

import math

import pytest
import torch
from fusion_models import CLASSES, NAMES, ROWS, SIZES, features_of
from torch.nn import functional as F

import mmfast as mf
from mmfast.models.fusion import MUSE, Grape, M3Care
from mmfast.models.fusion.graph import Graph, Messages
from mmfast.models.fusion.m3care import gaussian_kernel
from mmfast.models.fusion.muse import info_nce, same_label

M = len(NAMES)


def layer_by_hand(layer, samples, modalities, edges, there):
    """One layer of messages, an edge at a time."""

    def updated(x, messages):
        mean = torch.stack(messages).mean(0) if messages else torch.zeros(layer.update.in_features - len(x)).double()
        h = layer.update(torch.cat([mean, x])).relu()
        return h / h.norm().clamp(min=1e-12) if layer.normalize else h

    def message(x, e):
        return layer.message(torch.cat([x, e])).relu()

    b, m = there.shape
    to_samples = [[message(modalities[j], edges[0][i, j]) for j in range(m) if there[i, j]] for i in range(b)]
    to_modalities = [[message(samples[i], edges[1][i, j]) for i in range(b) if there[i, j]] for j in range(m)]
    return (
        torch.stack([updated(samples[i], to_samples[i]) for i in range(b)]),
        torch.stack([updated(modalities[j], to_modalities[j]) for j in range(m)]),
    )


def graph_by_hand(graph, samples, modalities, attributes, there):
    edges = attributes, attributes
    for i, layer in enumerate(graph.layers):
        samples, modalities = layer_by_hand(layer, samples, modalities, edges, there)
        if i + 1 < len(graph.layers):
            new = [torch.zeros(*there.shape, samples.shape[1]).double() for _ in edges]
            for b in range(len(samples)):
                for m in range(there.shape[1]):
                    source, target = modalities[m], samples[b]
                    new[0][b, m] = graph.edge_updates[i](torch.cat([source, target, edges[0][b, m]])).relu()
                    new[1][b, m] = graph.edge_updates[i](torch.cat([target, source, edges[1][b, m]])).relu()
            edges = new
    return samples


@pytest.mark.parametrize("normalize", [True, False])
def test_messages_edge_by_edge(normalize):
    _, there, _ = features_of()
    samples, modalities, attributes = (torch.randn(*s).double() for s in ((ROWS, 4), (M, 4), (ROWS, M, 5)))
    attributes[~there] = 9.0  # of no edge
    layer = Messages(4, 5, 6, normalize).double()
    edges = attributes, torch.randn(ROWS, M, 5).double()
    for a, b in zip(layer(samples, modalities, edges, there), layer_by_hand(layer, samples, modalities, edges, there), strict=True):
        torch.testing.assert_close(a, b)
    graph = Graph(4, 5, 6, 3, normalize).double()
    found = graph(samples, modalities, attributes, there)
    torch.testing.assert_close(found, graph_by_hand(graph, samples, modalities, attributes, there))
    assert not normalize or torch.allclose(found.norm(dim=1), torch.ones(ROWS).double())


def test_a_layer_against_torch_geometric():
    geometric = pytest.importorskip("torch_geometric.nn")
    _, there, _ = features_of()
    layer = Messages(4, 5, 6, normalize=True).double()
    samples, modalities, attributes = (torch.randn(*s).double() for s in ((ROWS, 4), (M, 4), (ROWS, M, 5)))

    class EGraphSage(geometric.MessagePassing):
        def forward(self, x, edge_index, edge_attr):
            return self.propagate(edge_index, x=x, edge_attr=edge_attr)

        def message(self, x_j, edge_attr):
            return layer.message(torch.cat([x_j, edge_attr], 1)).relu()

        def update(self, messages, x):
            return F.normalize(layer.update(torch.cat([messages, x], 1)).relu(), dim=1)

    b, m = there.nonzero(as_tuple=True)
    both = torch.cat([torch.stack([b, ROWS + m]), torch.stack([ROWS + m, b])], 1)
    theirs = EGraphSage(aggr="mean")(torch.cat([samples, modalities]), both, attributes[b, m].repeat(2, 1))
    ours = torch.cat(layer(samples, modalities, (attributes, attributes), there))
    torch.testing.assert_close(ours, theirs)


# Grape


def test_grape_is_messages_between_samples_and_modalities():
    features, there, _ = features_of()
    fusion = Grape(SIZES, CLASSES, 8).double().eval()
    attributes = torch.stack([fusion.edges[n](f) for n, f in features.items()], 1)
    ones, one_hot = torch.ones(ROWS, M).double(), torch.eye(M).double()
    expected = fusion.classifier(graph_by_hand(fusion.graph, ones, one_hot, attributes, there))
    torch.testing.assert_close(fusion(features, there), expected)
    nodes = fusion.graph(ones, one_hot, attributes, there)
    torch.testing.assert_close(nodes.norm(dim=1), torch.ones(ROWS).double())
    fusion.train()
    torch.manual_seed(2)
    found = fusion(features, there)
    torch.manual_seed(2)
    kept = there & (torch.rand(ROWS, M) >= 0.3)
    assert (kept != there).any()
    torch.testing.assert_close(found, fusion.eval()(features, kept))


def test_in_grape_samples_see_one_another():
    features, there, _ = features_of()
    fusion = Grape(SIZES, CLASSES, 8).double().eval()
    leaves = {n: f.clone().requires_grad_() for n, f in features.items()}
    fusion(leaves, there)[1].sum().backward()
    others = torch.arange(ROWS) != 1
    assert any((leaf.grad[others] != 0).any() for leaf in leaves.values())
    assert all((leaf.grad[~there[:, i]] == 0).all() for i, leaf in enumerate(leaves.values()))


def test_grape_refuses_to_drop_all():
    with pytest.raises(ValueError, match="drop is 1.0, expected a share"):
        Grape(SIZES, CLASSES, drop=1.0)


# MUSE


def test_info_nce():
    u, v = (F.normalize(torch.randn(5, 3).double(), dim=1) for _ in range(2))
    total = 0.0
    for i in range(5):
        for a, b in ((u, v), (v, u)):
            total += -math.log(math.exp(a[i] @ b[i] / 0.07) / sum(math.exp(a[i] @ b[j] / 0.07) for j in range(5))) / 10
    torch.testing.assert_close(info_nce(u, v), torch.tensor(total).double())


@pytest.mark.parametrize("labels", [False, True])
def test_same_label(labels):
    u, v = (F.normalize(torch.randn(5, 3).double(), dim=1) for _ in range(2))
    target = torch.tensor([[0.0, 1], [0, 0], [0, 1], [1, 1], [0, 0]]) if labels else torch.tensor([2, 0, 2, 1, 0])
    same = {(0, 2), (2, 0), (1, 4), (4, 1), *((i, i) for i in range(5))}
    total = 0.0
    for a, b, weight in ((u, u, 0.5), (u, v, 0.25), (v, u, 0.25)):
        for i in range(5):
            for j in range(5):
                p = 1 / (1 + math.exp(-(a[i] @ b[j]) / 0.07))
                total += -weight * math.log(p if (i, j) in same else 1 - p) / 25
    torch.testing.assert_close(same_label(u, v, target), torch.tensor(total).double())


def test_muse_goes_through_its_graph_twice():
    features, there, target = features_of()
    fusion = MUSE(SIZES, CLASSES, 8, dropout=0.0).double()
    attributes = torch.stack([fusion.edges[n](f) for n, f in features.items()], 1)

    def samples(seen):
        return graph_by_hand(fusion.graph, torch.ones(ROWS, 8).double(), fusion.modalities, attributes, seen)

    torch.testing.assert_close(fusion(features, there), fusion.classifier(samples(there)))
    assert (samples(there).norm(dim=1) - 1).abs().max() > 1e-3  # no length of 1, as Grape's have
    passes = []
    hook = fusion.graph.register_forward_pre_hook(lambda _, args: passes.append(args[3]))
    found = fusion.loss(features, there, target)
    hook.remove()
    assert len(passes) == 2 and torch.equal(passes[0], there) and not (passes[1] & ~there).any() and (passes[1] != there).any()
    z, again = map(samples, passes)
    u, v = (F.normalize(fusion.projection(of).tanh(), dim=1) for of in (z, again))
    expected = F.cross_entropy(fusion.classifier(z), target) + 0.5 * info_nce(u, v) + 0.5 * same_label(u, v, target)
    torch.testing.assert_close(found, expected)


def test_muse_resolves_what_its_losses_send_to_the_nodes():
    features, there, target = features_of()
    fusion = MUSE(SIZES, CLASSES, 8, dropout=0.0, resolver=mf.IMTLG()).double()
    nodes = [torch.randn(ROWS, 8).double().requires_grad_() for _ in range(2)]
    given = iter(nodes)
    fusion._samples = lambda *_: next(given)
    fusion.loss(features, there, target).backward()
    u, v = (F.normalize(fusion.projection(of).tanh(), dim=1) for of in nodes)
    losses = F.cross_entropy(fusion.classifier(nodes[0]), target), 0.5 * info_nce(u, v), 0.5 * same_label(u, v, target)
    each = [torch.autograd.grad(loss, nodes, retain_graph=True, materialize_grads=True) for loss in losses]
    expected = mf.resolve([torch.stack(g).flatten() for g in each], mf.IMTLG(), preserve_norm=True)
    torch.testing.assert_close(torch.stack([of.grad for of in nodes]).flatten(), expected)
    assert fusion.block.stats().names == ("task", "passes", "labels")
    torch.testing.assert_close(fusion.block.stats().gram.diagonal(), torch.stack([torch.stack(g).square().sum() for g in each]))


def test_muse_leaves_out_edges_of_half_of_the_samples():
    fusion = MUSE(SIZES, CLASSES, 8)
    there = torch.tensor([[True, True, True]] * 4000 + [[True, False, True]] * 4000 + [[False, True, False]] * 9 + [[False] * 3] * 9)
    kept = fusion._fewer(there)
    size, n = kept.sum(1), there.sum(1)
    assert not (kept & ~there).any() and torch.equal(size[8000:], n[8000:])
    shares = [[(size[part] == k).double().mean().item() for k in (1, 2, 3)] for part in (slice(0, 4000), slice(4000, 8000))]
    torch.testing.assert_close(torch.tensor(shares), torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]), rtol=0, atol=0.04)


# M3Care


def similarity_by_hand(fusion, x, there):
    """Pair by pair; batch norm in eval mode."""
    kernels = []
    for i, n in enumerate(NAMES):
        share, rows = fusion.share[n].sigmoid(), there[:, i]
        of_both = gaussian_kernel(fusion.norm(fusion.projections[n](x[n])), rows), gaussian_kernel(fusion.norm(x[n]), rows)
        kernels.append((1 - share) * of_both[0] + share * of_both[1])
    s = torch.zeros(ROWS, ROWS).double()
    for a in range(ROWS):
        for b in range(ROWS):
            both = [k[a, b] for i, k in enumerate(kernels) if there[a, i] and there[b, i]]
            mean = sum(both) / len(both) if both else torch.tensor(0.0).double()
            s[a, b] = mean if mean > fusion.threshold.sigmoid() else 0.0
    return s


def m3care(**change):
    fusion = M3Care(SIZES, CLASSES, 8, 2, 0.0, **change).double()
    with torch.no_grad():
        fusion.threshold.fill_(-0.9)  # 0.29: some pairs above it and some below
        fusion.norm.running_mean.normal_()
        fusion.norm.running_var.uniform_(0.5, 2)
    return fusion.eval()


def test_the_kernel():
    x = torch.randn(5, 3).double()
    d = torch.tensor([[(a - b).square().sum() for b in x] for a in x])
    for there in (torch.ones(5).bool(), torch.tensor([True, False, True, True, False])):
        n = int(there.sum())
        mean = d[there][:, there].sum() / (n * (n - 1))
        torch.testing.assert_close(gaussian_kernel(x, there), ((-d / mean / 0.5).exp() + (-d / mean).exp() + (-d / mean / 2).exp()) / 3)
    assert torch.equal(gaussian_kernel(torch.zeros(3, 2), torch.ones(3).bool()), torch.ones(3, 3))
    assert gaussian_kernel(torch.ones(1, 2), torch.ones(1).bool()) == 1 and gaussian_kernel(torch.ones(1, 2), torch.zeros(1).bool()) == 1


@pytest.mark.parametrize(
    "make",
    [lambda: m3care(), lambda: Grape(SIZES, CLASSES).double(), lambda: MUSE(SIZES, CLASSES, 8).double()],
    ids=["M3Care", "Grape", "MUSE"],
)
def test_predictions_know_no_order_of_rows(make):
    """Of a batch; whoever stands in for the rows without a modality must not be told by its place."""
    features, there, _ = features_of()
    fusion, order = make().eval(), torch.randperm(ROWS)
    assert not there.all() and not torch.equal(there[order], there)
    torch.testing.assert_close(fusion({n: f[order] for n, f in features.items()}, there[order]), fusion(features, there)[order])


def test_m3care_makes_up_what_is_missing_from_similar_samples():
    features, there, _ = features_of()
    fusion = m3care()
    x = fusion._mapped(features, there)
    s = similarity_by_hand(fusion, x, there)
    torch.testing.assert_close(fusion.similarity(x, there), s)
    off = ~torch.eye(ROWS, dtype=torch.bool)
    assert (s[off] > 0).any() and (s[off] == 0).any() and (s[0] == 0).all()  # nothing is known of the first
    found = fusion.complete(x, there)
    for i, n in enumerate(NAMES):
        h = x[n] * there[:, i : i + 1]
        for layer in fusion.graphs[n]:
            new = []
            for row in range(ROWS):
                weights = [(s[row, other], other) for other in range(ROWS) if there[other, i] and s[row, other] > 0]
                total = sum(w for w, _ in weights)
                near = sum(w / total * h[other] for w, other in weights) if weights else torch.zeros(8).double()
                new.append(F.selu(layer(near)))
            h = torch.stack(new)
        for row in range(ROWS):
            if there[row, i]:
                a, b = fusion.imputed_score[n](h[row]).sigmoid(), fusion.own_score[n](x[n][row]).sigmoid()
                w = a / (a + b)
                torch.testing.assert_close(found[row, i], w * h[row] + (1 - w) * x[n][row])
            else:
                torch.testing.assert_close(found[row, i], h[row])
    logits = fusion.classifier(fusion.fuse(found + fusion.kinds).flatten(1))
    torch.testing.assert_close(fusion(features, there), logits)


def test_in_m3care_a_missing_modality_depends_on_others_that_have_it():
    """The released code masks the rows, too, and gives such a sample nothing."""
    features, there, _ = features_of()
    fusion = m3care()
    lacks = next(row for row in range(1, ROWS) if not there[row, 0] and there[row].any())
    leaf = features["image"].clone().requires_grad_()
    x = fusion._mapped({**features, "image": leaf}, there)
    fusion.complete(x, there)[lacks, 0].sum().backward()
    assert (leaf.grad != 0).any() and (leaf.grad[~there[:, 0]] == 0).all()


def test_the_threshold_learns_and_the_result_is_that_of_the_similarity():
    features, there, _ = features_of()
    fusion = m3care()
    s = fusion.similarity(fusion._mapped(features, there), there)
    s.sum().backward()
    t = fusion.threshold.detach().sigmoid()
    torch.testing.assert_close(fusion.threshold.grad, -(s > 0).sum() * t * (1 - t))


def test_the_regulariser_of_m3care():
    features, there, target = features_of()
    fusion = m3care(norm_weight=0.3)
    x = fusion._mapped(features, there)
    gap = sum((fusion.projections[n](x[n])[there[:, i]].norm() - x[n][there[:, i]].norm()).abs() for i, n in enumerate(NAMES))
    torch.testing.assert_close(fusion.loss(features, there, target), F.cross_entropy(fusion(features, there), target) + 0.3 * gap)
