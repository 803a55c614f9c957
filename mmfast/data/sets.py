"""The data sets of Table 1 of Javaloy et al. (ICML 2022): their files, checksums, and the kind of every column, in one place.

A column is "name kind", with the number of classes behind "categorical" and "ordinal"; "name -" is not used. Wine, Adult, Credit, Bank and Diamonds have
the kinds of the paper's own files. The others were never published: theirs are ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """Where the rows are and what they hold."""

    file: str  # below a data folder
    sha256: str  # empty: not checked, the file is the user's own copy of the original
    rows: int  # in the file
    columns: str
    header: bool = True
    separator: str = ","  # a blank stands for any white space
    complete: bool = False  # rows with a missing cell are left out
    note: str = ""


SETS = {
    "Adult": DataSet(
        "Adult/data.csv.gz",
        "f3bcf622a42fbad45460d4e8ccb2fa236138c12be54b49333eee4ac940149ee5",
        32561,
        """age count, workclass categorical 7, weight positive, education ordinal 16, marital_status categorical 7, occupation categorical 14,
        relationship categorical 6, race categorical 5, sex binary, capital_gain positive, capital_loss positive, hours count""",
        header=False,
    ),
    "Credit": DataSet(
        "Credit/data.csv.gz",
        "7b9a3918d9a8d21781d645f281e4a61a02dcebb5b406490e50b031a25e0c206b",
        30000,
        """limit positive, sex categorical 3, education categorical 7, marriage categorical 4, age count, status_1 ordinal 11, status_2 ordinal 11,
        status_3 ordinal 11, status_4 ordinal 11, status_5 ordinal 11, status_6 ordinal 11, bill_1 real, bill_2 real, bill_3 real, bill_4 real,
        bill_5 real, bill_6 real, paid_1 positive, paid_2 positive, paid_3 positive, paid_4 positive, paid_5 positive, paid_6 positive,
        default binary""",
        header=False,
    ),
    "Wine": DataSet(
        "Wine/data.csv.gz",
        "e8ceb23abc94a04d100564f267633881c053d4e113f46e09afe231bf93d72cf2",
        6497,
        """fixed_acidity positive, volatile_acidity positive, citric_acid positive, residual_sugar positive, chlorides positive,
        free_sulfur_dioxide positive, total_sulfur_dioxide positive, density positive, ph positive, sulphates positive, alcohol positive,
        quality count, colour binary""",
        header=False,
    ),
    "Diamonds": DataSet(
        "Diamonds/data.csv.gz",
        "ae6026840a8875c4563cae72cc92202c01d3de04a30ee454f58116a564c6c326",
        53940,
        """index -, carat positive, cut categorical 5, color categorical 7, clarity categorical 8, depth real, table real, price real,
        x real, y real, z real""",
    ),
    "Bank": DataSet(
        "Bank/data.csv.gz",
        "da3e5eb35e0753d8f77906c64545b947f6fd7eae8923ed67a935dbc1cdb01dc4",
        41188,
        """index -, age real, job categorical 12, marital categorical 4, education categorical 8, default categorical 3, housing categorical 3,
        loan categorical 3, contact binary, month categorical 10, day_of_week categorical 5, duration real, campaign real, pdays real, previous real,
        poutcome categorical 3, emp_var_rate real, cons_price_idx real, cons_conf_idx real, euribor3m real, nr_employed real, y binary""",
    ),
    "IMDB": DataSet(
        "IMDB/movies.csv.gz",
        "3dbdff8fec3e60c7cfab13e2dc7bc17932b4e479d12788bc66dcd1be573f2966",
        58788,
        """title -, year count, length count, budget positive, rating real, votes count, r1 real, r2 real, r3 real, r4 real, r5 real, r6 real, r7 real,
        r8 real, r9 real, r10 real, mpaa categorical 4, action binary, animation binary, comedy binary, drama binary, documentary binary,
        romance binary, short binary""",
        note="a film without an MPAA rating counts as a missing cell",
    ),
    "HI": DataSet(
        "HI/HI.csv.gz",
        "950536092d051336c49a563841bf3085e93598edd8c6921439597b496755c73d",
        22272,
        """index -, whrswk count, hhi binary, whi binary, hhi2 binary, education categorical 6, race categorical 3, hispanic binary, experience real,
        kidslt6 count, kids618 count, husby positive, region categorical 4, wght positive""",
    ),
    "rwm5yr": DataSet(
        "rwm5yr/rwm5yr.csv.gz",
        "2ceeae20cf03065afd943ff6fbb2e56a1be3982ac8c69b9a07fddec659d037ea",
        19609,
        """index -, id -, docvis count, hospvis count, year categorical 5, edlevel categorical 4, age count, outwork binary, female binary,
        married binary, kids binary, hhninc positive, educ real, self binary, edlevel1 binary, edlevel2 binary, edlevel3 binary, edlevel4 binary""",
    ),
    "labour": DataSet(
        "labour/DAAG_cps1.csv.gz",
        "75c81026865fb694478a191689be3faf4fe6eb2e443d2a8083db165f003dd02c",
        15992,
        """index -, trt -, age count, educ count, black binary, hisp binary, marr binary, nodeg binary, re74 positive, re75 positive,
        re78 positive""",
        note="which data set the paper calls labour is not known; this is DAAG's cps1, the likeliest",
    ),
    "ElNino": DataSet(
        "ElNino/tao-all2.csv.gz",
        "739a4707e878ab423ac37e8c09e5cd420a090f2c223c05262631882f388984e5",
        178080,
        """obs -, year -, month -, day -, date -, latitude real, longitude real, zon_winds real, mer_winds real, humidity real, air_temp real,
        ss_temp real""",
        complete=True,
    ),
    "Magic": DataSet(
        "Magic/magic04.csv.gz",
        "a5a529ee8bdc44db07c37167ac68d231ab5110fdca02202a29c81a681ac37ec0",
        19020,
        """length real, width real, size real, conc real, conc1 real, asym real, m3_long real, m3_trans real, alpha real, dist real, class -""",
    ),
    "BooNE": DataSet(
        "BooNE/MiniBooNE_PID.txt",
        "",
        130064,
        ", ".join(f"particle_{i} real" for i in range(1, 51)),
        separator=" ",
        note="the file of the UCI repository, as it is",
    ),
}
