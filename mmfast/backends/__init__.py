"""The backends: cpu and cuda (compiled), triton (portable GPU kernels), reference (plain torch). choice.py says which one serves a call,
and proof.py why a GPU's may: it runs the problems of ladder.py on a device (target.py) and keeps what it finds (verdict.py).

Each has the same functions, on checked arguments: gradients that are there, the indices of the `missing` ones, a mask over all K.

    gram(grads, missing, mask, per)                                                     -> float64 [K, K], or [B, K, K] per sample
    combine(grads, missing, mask, w, per)                                               -> like one gradient
    lengths(grads, missing, mask, w, per)                                               -> squared: of the plain sum, of sum_i w_i g_i
    weights(G, mask, bound, preserve_norm, precision)                                   -> float64 [..., K]
    resolve(grads, missing, mask, bound, per, preserve_norm, with_gram)                 -> (like one gradient, weights | Gramian)
    graddrop(grads, missing, mask, rule), trimmed_mean(grads, missing, mask, rule)      -> like one gradient
    heads(delta, weight, head_of, mask, bound, k, per, preserve_norm)                   -> (gradient of the input, weights | Gramian)
    why_not()                                                                           -> None where it can run, else the reason

`bound` is a chain of rules with its states and random stream (resolvers/chain.py), which move on in place.
"""
