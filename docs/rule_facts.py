"""What the page of a rule says that its class does not: the formula, where not to use it, its paper, and how it is drawn."""

from collections.abc import Callable
from dataclasses import dataclass

import mmfast as mf


@dataclass(frozen=True)
class Facts:
    """Of one rule."""

    formula: str  # LaTeX
    avoid: str  # when not to use it: Markdown
    paper: str  # its address; "" where the docstring has all that is known
    make: Callable[[int], mf.Resolver]  # K -> the rule as it is drawn and measured
    tests: str  # the file that holds it to its formula
    rows: str = "two"  # what it is drawn with: "two" gradients, "four" of which one is corrupted, or products of two "batches"
    step: float = 0.05  # of the trajectories


_LAWS = "tests/test_rules.py"

FAMILIES: dict[str, dict[str, Facts]] = {
    "No Gramian": {
        "Sum": Facts(
            r"d = \sum_i g_i",
            "Where gradients conflict or differ much in length: the longest decides. It is what to compare every other rule with.",
            "",
            lambda k: mf.Sum(),
            _LAWS,
        ),
        "Mean": Facts(
            r"d = \frac1K \sum_i g_i",
            "As `Sum`, whose direction it has; a missing gradient makes the others count for more.",
            "",
            lambda k: mf.Mean(),
            _LAWS,
        ),
        "Constant": Facts(
            r"d = \sum_i w_i\, g_i",
            "Where the lengths of the gradients change while training: fixed weights cannot follow them, and each takes a search.",
            "",
            lambda k: mf.Constant([1.0, *[3.0] * (k - 1)]),
            _LAWS,
        ),
        "Random": Facts(
            r"w = \operatorname{softmax}(\xi), \qquad \xi_i \sim \mathcal N(0, 1)",
            "Where one step must not go against a gradient: in the mean over calls it is `Mean`, with noise. A baseline.",
            "https://arxiv.org/abs/2111.10603",
            lambda k: mf.Random(),
            "tests/test_methods.py",
        ),
    },
    "Projection": {
        "PCGrad": Facts(
            r"g_i' \leftarrow g_i' - \frac{\min(0,\ g_i'^\top g_j)}{\lVert g_j\rVert^2}\, g_j \quad (j \ne i \text{ in random order}), \qquad d = \sum_i g_i'",
            "Where lengths differ much and do not conflict: it then is the plain sum. From three gradients on the result may still conflict with one, "
            "and depends on the order; `UPGrad` does neither (for two gradients its direction is PCGrad's).",
            "https://arxiv.org/abs/2001.06782",
            lambda k: mf.PCGrad(),
            "tests/test_projection.py",
        ),
        "GradVac": Facts(
            r"g_i' \leftarrow g_i' + \frac{\lVert g_i'\rVert}{\lVert g_j\rVert}\Bigl(\hat\varphi_{ij}\sqrt{\tfrac{1-\varphi^2}{1-\hat\varphi_{ij}^2}} - \varphi\Bigr) g_j"
            r"\ \text{ where } \varphi = \cos(g_i', g_j) < \hat\varphi_{ij}, \qquad"
            r" \hat\varphi_{ij} \leftarrow (1-\beta)\,\hat\varphi_{ij} + \beta\varphi",
            'Where calls bring other problems (`per="sample"` with shuffled samples): its running cosines would be of no pair. '
            "At the first call it is PCGrad.",
            "https://arxiv.org/abs/2010.05874",
            lambda k: mf.GradVac(),
            "tests/test_projection.py",
        ),
    },
    "Min-norm": {
        "MGDA": Facts(
            r"w = \operatorname*{arg\,min}_{w \ge 0,\ \sum_i w_i = 1} w^\top G\, w",
            "Where gradients differ much in length, with `preserve_norm=True`, the default of blocks: the shortest gets nearly all of the weight and is then "
            "blown up. It is the one rule with a loss in [our runs](../table1.md) (VAE on Wine, 0.085 to 0.297).",
            "https://arxiv.org/abs/1810.04650",
            lambda k: mf.MGDA(),
            "tests/test_minnorm.py",
        ),
        "CAGrad": Facts(
            r"d = \operatorname*{arg\,max}_{\lVert d - g_0\rVert \le c\lVert g_0\rVert}\ \min_i\, g_i^\top d, \qquad g_0 = \tfrac1K \sum_i g_i",
            "Where no gradient may be harmed: below `c = 1` the result may conflict with one. Where one gradient is much longer than the others, the mean "
            "that it stays near is that gradient.",
            "https://arxiv.org/abs/2110.14048",
            lambda k: mf.CAGrad(),
            "tests/test_minnorm.py",
        ),
        "MMPareto": Facts(
            r"d = \gamma \begin{cases} s = \sum_i g_i & \text{if no two gradients conflict} \\"
            r" \max\bigl(1, \lVert s\rVert / \lVert K m\rVert\bigr)\, K m & \text{else, } m \text{ the shortest vector of their hull} \end{cases}",
            "For more than the paper's two rows it is our reading of it. Its factor is a matter of step size: compare at several learning rates "
            "([imbalance](../imbalance.md)).",
            "https://arxiv.org/abs/2405.17730",
            lambda k: mf.MMPareto(),
            "tests/test_methods.py",
        ),
    },
    "Cone": {
        "UPGrad": Facts(
            r"d = \sum_i p_i\, \pi(g_i), \qquad \pi(v) = \operatorname*{arg\,min}_{u:\ g_j^\top u \ge 0\ \forall j} \lVert u - v\rVert",
            "Where the longest gradient must not decide: projections keep lengths (`Compose(Unit(), UPGrad())` takes them away). With many gradients "
            "(K = 64) it is the dearest of the compiled rules to solve.",
            "https://arxiv.org/abs/2406.16232",
            lambda k: mf.UPGrad(),
            _LAWS,
        ),
        "DualProj": Facts(
            r"d = \operatorname*{arg\,min}_{u:\ g_j^\top u \ge 0\ \forall j} \Bigl\lVert u - \sum_i p_i\, g_i \Bigr\rVert",
            "Where every gradient is to make progress: one that the sum goes against ends at the edge of the cone, with none.",
            "https://arxiv.org/abs/1706.08840",
            lambda k: mf.DualProj(),
            _LAWS,
        ),
        "PCD": Facts(
            r"d \propto \operatorname*{arg\,min}_u \lVert u - \tilde g_1\rVert^2 \ \text{ with } \tilde g_j^\top u \ge \tau \lVert\tilde g_j\rVert^2\ (j \ge 2),"
            r" \qquad \tilde g_j = g_j / \sqrt{v_j},\quad \lVert d\rVert = \lVert g_1\rVert",
            "Where no loss comes first: the first gradient is the primary one, so the order of the branches matters.",
            "https://openreview.net/forum?id=HT01yGHLEt",
            lambda k: mf.PCD(),
            _LAWS,
        ),
    },
    "Bargaining": {
        "NashMTL": Facts(
            r"(G w)_i = \frac1{w_i}",
            "Where the length of the direction is to tell how near the end is: without `preserve_norm` it is $\\sqrt K$ nearly everywhere.",
            "https://arxiv.org/abs/2202.01017",
            lambda k: mf.NashMTL(),
            "tests/test_bargaining.py",
            step=0.015,
        ),
        "FairGrad": Facts(
            r"(G w)_i = w_i^{-1/\alpha}",
            "With `alpha` between 0 and 0.05 (refused), and where a length that goes with the gradients' is wanted without `preserve_norm`.",
            "https://arxiv.org/abs/2402.15638",
            lambda k: mf.FairGrad(2.0),
            "tests/test_bargaining.py",
            step=0.008,
        ),
    },
    "Alignment": {
        "IMTLG": Facts(
            r"w = \frac{D^{-1} C^+ 1}{1^\top D^{-1} C^+ 1}",
            "Where gradients may be nearly dependent: the sum of its weights can be negative, and the direction then opposes every gradient, as published. "
            "`ConFIG` has the same direction with the sign always right.",
            "https://openreview.net/forum?id=IMPnRXEWpvr",
            lambda k: mf.IMTLG(),
            "tests/test_alignment.py",
        ),
        "AlignedMTL": Facts(
            r"w = \sqrt\sigma\; V \Lambda^{-1/2} V^\top p, \qquad G = V \Lambda V^\top, \quad \sigma = \lambda_{\min}",
            'Where two gradients are nearly the same: with `scale="min"` all become as short as the root of the smallest eigenvalue. The result may conflict with a gradient.',
            "https://arxiv.org/abs/2305.19000",
            lambda k: mf.AlignedMTL(),
            "tests/test_alignment.py",
        ),
        "ConFIG": Facts(
            r"d = \Bigl(\sum_i g_i^\top u\Bigr) u, \qquad u \propto U^+ p, \quad U_i = g_i / \lVert g_i\rVert",
            "Where one gradient is noise: it counts as much as the others, however short it is.",
            "https://arxiv.org/abs/2408.11104",
            lambda k: mf.ConFIG(),
            "tests/test_alignment.py",
        ),
    },
    "Magnitude": {
        "Unit": Facts(
            r"w_i = \frac1{\lVert g_i\rVert}",
            "Without `preserve_norm` under a loss scale: the result does not depend on the gradients' lengths. It resolves no conflict; put it before a rule that does.",
            "",
            lambda k: mf.Unit(),
            _LAWS,
            step=0.015,
        ),
        "DBMTL": Facts(
            r"w_i = \frac{\max_j \lVert g_j\rVert}{\lVert g_i\rVert}",
            "Where short gradients are noise (a branch that has learned): they are made as long as the longest. It resolves no conflict of direction.",
            "https://arxiv.org/abs/2308.12029",
            lambda k: mf.DBMTL(),
            _LAWS,
        ),
        "GradNorm": Facts(
            r"w = K \operatorname{softmax}(s), \qquad s \text{ by Adam on } \sum_i \Bigl| w_i n_i - \tfrac1K \textstyle\sum_j w_j n_j\; r_i^{\alpha} \Bigr|,"
            r"\qquad n_i = \frac{\lVert g_i\rVert}{\operatorname{mean}_j \lVert g_j\rVert},\ r_i = \frac{\text{change of } \lVert g_i\rVert}{\text{mean change}}",
            "In short trainings: its weights move by `lr` a call from 1. Where directions conflict at like lengths it does nothing.",
            "https://arxiv.org/abs/1711.02257",
            lambda k: mf.GradNorm(lr=0.05, update_at=1),
            "tests/test_magnitude.py",
        ),
        "NSGD": Facts(
            r"w_i = \frac{1}{\lVert g_i\rVert} \sum_j \alpha_j \lVert g_j\rVert, \qquad \alpha_j \propto \frac{\lVert g_j\rVert}{\lVert g_j\rVert \text{ at call } t_0}",
            "Where directions conflict: it makes lengths alike and nothing else. Where the gradients of call `update_at` are not typical, they are the measure all the same.",
            "https://arxiv.org/abs/2103.02631",
            lambda k: mf.NSGD(),
            "tests/test_magnitude.py",
        ),
    },
    "Robust": {
        "Krum": Facts(
            r"\text{score}_i = \sum_{j \in N(i)} \lVert g_i - g_j\rVert^2, \quad N(i) \text{ the } K - f - 2 \text{ nearest}; \qquad d = \text{mean of the } m \text{ best}",
            "For the branches of modalities: it leaves out the ones that differ from the rest, which are those that a block is to protect. It is for workers "
            "that compute the same gradient, of which some are corrupted.",
            "https://arxiv.org/abs/1703.02757",
            lambda k: mf.Krum(1),
            _LAWS,
            rows="four",
        ),
        "TrimmedMean": Facts(
            r"d_n = \text{mean of the } K - 2b \text{ middle values of } g_{1n}, \dots, g_{Kn}",
            "For the branches of modalities, as `Krum`: what differs is cut. With one value left out on each side, three gradients are their median.",
            "https://arxiv.org/abs/1803.01498",
            lambda k: mf.TrimmedMean(1),
            "tests/test_methods.py",
            rows="four",
        ),
        "GradDrop": Facts(
            r"P = \tfrac12\Bigl(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\Bigr), \quad U \sim \mathcal U(0, 1), \qquad"
            r" d = \sum_i \bigl(\ell_i + (1 - \ell_i) M_i\bigr) g_i, \qquad M_i = [P > U \wedge g_i > 0] + [P < U \wedge g_i < 0] \quad \text{by element}",
            "Where a step must not go against a gradient: signs are drawn by element, so the direction conflicts often. It depends on the basis, and has no weights for `stats()`.",
            "https://arxiv.org/abs/2010.06808",
            lambda k: mf.GradDrop(),
            "tests/test_graddrop.py",
        ),
    },
    "Of other rules": {
        "Compose": Facts(
            r"J^{(s)} = A_s\bigl(J^{(s-1)} J^{(s-1)\top}\bigr)\, J^{(s-1)}, \qquad d = 1^\top J^{(m)}",
            "Where a promise of an early step must hold: each step sees what the one before left, so what `UPGrad` promises is gone after a step behind it. Put it last.",
            "https://arxiv.org/abs/2206.04496",
            lambda k: mf.Compose(mf.Unit(), mf.UPGrad()),
            "tests/test_compose.py",
            step=0.03,
        ),
        "CRMOGM": Facts(
            r"w_t = \alpha\, w_{t-1} + (1 - \alpha)\, \hat w_t",
            "Where no gradient may be harmed: smoothed weights are those of other gradients, so what the inner rule promises of one call no longer holds.",
            "https://openreview.net/forum?id=ScwfQ7hdwyP",
            lambda k: mf.CRMOGM(mf.MGDA()),
            "tests/test_compose.py",
        ),
    },
    "Of two batches": {
        "MoDo": Facts(
            r"w \leftarrow \Pi_\Delta\bigl(w - \gamma\,(A + \rho)\, w\bigr), \qquad A = J_1 J_2^\top",
            "Inside a block: it needs `mf.gram(a, others=b)`, the gradients of two batches, and a third for the step. Its step `gamma` is for gradients as they are, so unscale them.",
            "https://arxiv.org/abs/2305.20057",
            lambda k: mf.MoDo(),
            "tests/test_stochastic.py",
            rows="batches",
        ),
        "SDMGrad": Facts(
            r"w \leftarrow \Pi_\Delta\bigl(w - \eta\, v\bigr),\qquad v \leftarrow \mu v + \frac{A}{(\operatorname{mean}_i \sqrt{A_{ii}})^2} (w + \lambda p)"
            r"\quad (n \text{ times}), \qquad d = \frac{(w + \lambda p)^\top J_3}{1 + \lambda}",
            "Inside a block, as `MoDo`. With one batch for both factors it is not the method.",
            "https://arxiv.org/abs/2305.18409",
            lambda k: mf.SDMGrad(),
            "tests/test_stochastic.py",
            rows="batches",
        ),
    },
    "For parameters": {
        "EMA": Facts(
            r"y_i \leftarrow g_i + \beta\, t^{-\sigma} (y_i - g_i), \qquad d = \text{inner}(y_1, \dots, y_K)",
            "At a shared tensor: what it keeps is of single parameters, and a block refuses it; use `mf.backward`. It keeps K gradients.",
            "https://arxiv.org/abs/2308.12029",
            lambda k: mf.EMA(mf.DBMTL()),
            "tests/test_tracking.py",
            step=0.03,
        ),
        "MoCo": Facts(
            r"y_i \leftarrow y_i - \beta t^{-\sigma_\beta} \Bigl(y_i - \ell_i \frac{g_i}{\lVert g_i\rVert}\Bigr), \qquad"
            r" w \leftarrow \operatorname{softmax}\bigl(w - \gamma t^{-\sigma_\gamma} (Y Y^\top + \rho)\, w\bigr), \qquad d = \sum_i w_i\, y_i",
            "At a shared tensor, as `EMA`. Without `see(losses)` the unit gradients are not multiplied by their losses, and nothing tells it how far each has come.",
            "https://arxiv.org/abs/2210.12624",
            lambda k: mf.MoCo(),
            "tests/test_tracking.py",
        ),
        "ExcessMTL": Facts(
            r"w_i \propto w_i \exp\Bigl(\eta\, \frac{e_i}{e_i(0)}\Bigr), \qquad e_i = g_i^\top \operatorname{diag}\bigl(\textstyle\sum_t g_i^2\bigr)^{-1/2} g_i",
            "At a shared tensor, as `EMA`. The logarithms of its weights add up over calls: in a long training one task may get nearly all of the weight.",
            "https://arxiv.org/abs/2402.02009",
            lambda k: mf.ExcessMTL(0.05),
            "tests/test_tracking.py",
        ),
        "MConFIG": Facts(
            r"m_i \leftarrow \beta_1 m_i + (1 - \beta_1)\, g_i, \qquad d = \frac{\hat m}{\sqrt{\hat s}}, \quad \hat m = \text{ConFIG}(\hat m_1, \dots, \hat m_K),"
            r"\ \hat s \text{ its second moment}",
            "Together with Adam: its result is a step of Adam already, for plain SGD. At a shared tensor, as `EMA`; it keeps K + 2 gradients.",
            "https://arxiv.org/abs/2408.11104",
            lambda k: mf.MConFIG(),
            "tests/test_tracking.py",
            step=0.02,
        ),
    },
}

FACTS = {name: facts for family in FAMILIES.values() for name, facts in family.items()}
