"""The tables of Javaloy, Meghdadi, Valera, "Mitigating modality collapse in multimodal VAEs via impartial optimization", ICML 2022.

Table 1: mean test errors.
"""

DATA_SETS = ("Adult", "Credit", "Wine", "Diamonds", "Bank", "IMDB", "HI", "rwm5yr", "labour", "ElNino", "Magic", "BooNE")

_ROWS = {
    "elbo": (
        (0.213, 0.128, 0.086, 0.187, 0.203, 0.082, 0.170, 0.105, 0.109, 0.109, 0.064, 0.042),
        (0.104, 0.041, 0.071, 0.139, 0.043, 0.032, 0.041, 0.026, 0.063, 0.068, 0.058, 0.039),
    ),
    "iwae": (
        (0.226, 0.134, 0.075, 0.185, 0.199, 0.090, 0.155, 0.094, 0.098, 0.086, 0.053, 0.037),
        (0.129, 0.051, 0.066, 0.125, 0.076, 0.035, 0.042, 0.032, 0.066, 0.061, 0.048, 0.035),
    ),
    "dreg": (
        (0.234, 0.132, 0.077, 0.176, 0.191, 0.088, 0.153, 0.094, 0.096, 0.085, 0.050, 0.037),
        (0.168, 0.075, 0.065, 0.139, 0.103, 0.055, 0.042, 0.026, 0.076, 0.069, 0.046, 0.036),
    ),
    "hivae": (
        (0.127, 0.107, 0.126, 0.114, 0.141, 0.079, 0.105, 0.044, 0.100, 0.098, 0.062, 0.039),
        (0.081, 0.060, 0.117, 0.011, 0.095, 0.049, 0.109, 0.024, 0.069, 0.015, 0.033, 0.038),
    ),
}

# ten times better than without a block: the source they were read from may have lost a digit
DOUBTFUL = {("hivae", "Diamonds"), ("hivae", "ElNino")}

# (model, data set) -> (without block, with the block and the rule that was best on validation)
TABLE1 = {(model, name): (plain, ours) for model, rows in _ROWS.items() for name, plain, ours in zip(DATA_SETS, *rows, strict=True)}

# Table 5: self and cross latent accuracy in %, and Table 9: reconstruction coherence given all modalities in %; of the same paper
_LATENT = {
    "mvae": (((69.68, 69.14, 68.58), (33.60, 39.15, 38.36)), ((69.95, 69.06, 69.75), (35.25, 49.73, 46.23))),
    "mmvae": (((71.81, 87.55, 71.30), (44.25, 76.81, 40.60)), ((87.83, 90.78, 85.55), (71.42, 84.80, 60.50))),
    "mopoe": (((89.85, 87.23, 67.58), (66.14, 83.71, 40.36)), ((91.47, 90.74, 69.26), (84.52, 90.48, 53.24))),
}
_COHERENCE = {
    "mvae": (
        ((97.53, 88.26, 99.30), (97.27, 87.19, 98.76), (97.37, 87.47, 98.83)),
        ((97.85, 89.65, 99.64), (98.28, 89.01, 99.93), (97.42, 87.63, 99.20)),
    ),
    "mmvae": (
        ((86.01, 45.59, 89.17), (85.25, 84.03, 88.66), (58.95, 61.27, 63.27)),
        ((89.42, 45.83, 91.54), (87.55, 86.87, 90.93), (74.85, 73.89, 81.09)),
    ),
    "mopoe": (
        ((95.72, 85.86, 98.01), (95.82, 87.55, 97.93), (75.10, 67.16, 76.61)),
        ((96.50, 93.60, 99.14), (97.29, 92.93, 99.00), (96.91, 89.01, 99.28)),
    ),
}
_OBJECTIVES = ("elbo", "iwae", "siwae")

# (model, objective, "self" or "cross") -> (without blocks, with the blocks and the rule that were best on validation)
TABLE5 = {
    (model, objective, name): (plain[j][i], ours[j][i])
    for model, (plain, ours) in _LATENT.items()
    for i, objective in enumerate(_OBJECTIVES)
    for j, name in enumerate(("self", "cross"))
}
# (model, objective, modality) -> likewise
TABLE9 = {
    (model, objective, letter): (plain[i][j], ours[i][j])
    for model, (plain, ours) in _COHERENCE.items()
    for i, objective in enumerate(_OBJECTIVES)
    for j, letter in enumerate("MST")
}

# The tables of Chaudhuri, Dutta, Bui, Georgescu, "A closer look at multimodal representation collapse", ICML 2025, on MIMIC-IV: in-hospital mortality and
# readmission, area under ROC and under precision and recall of each. Missing modalities: means over missing rates; "EBR" is named without its fusion.
MISSING = {
    "cmae": (0.7873, 0.3620, 0.6007, 0.3355),
    "smil": (0.7981, 0.3536, 0.6155, 0.3279),
    "mt": (0.8176, 0.3467, 0.6278, 0.2959),
    "grape": (0.7657, 0.3733, 0.6335, 0.3120),
    "m3care": (0.8265, 0.3830, 0.6020, 0.3870),
    "shaspec": (0.8100, 0.3630, 0.6216, 0.3549),
    "muse": (0.8236, 0.3987, 0.6781, 0.4185),
    "ebr": (0.8533, 0.4277, 0.7030, 0.4290),
}
# (system, cure) -> likewise, without missing modalities
PLUS = {
    ("grape", "none"): (0.8837, 0.4584, 0.7085, 0.4551),
    ("grape", "kd"): (0.9011, 0.4620, 0.7231, 0.4610),
    ("grape", "ebr"): (0.9102, 0.4799, 0.7488, 0.4691),
    ("m3care", "none"): (0.8896, 0.4603, 0.7067, 0.4532),
    ("m3care", "kd"): (0.8950, 0.4700, 0.7080, 0.4562),
    ("m3care", "ebr"): (0.8987, 0.4850, 0.7296, 0.4832),
    ("muse", "none"): (0.9201, 0.4883, 0.7351, 0.4985),
    ("muse", "kd"): (0.9350, 0.4993, 0.7402, 0.5066),
    ("muse", "ebr"): (0.9380, 0.5001, 0.7597, 0.5138),
}
