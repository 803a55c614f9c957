"""The data sets of Table 1 of Javaloy et al. (ICML 2022): their files, checksums, and the kind of every column, in one place.

A column is "name kind", with the number of classes behind "categorical" and "ordinal"; "name -" is not used. Wine, Adult, Credit, Bank and Diamonds have
the kinds of the paper's own files. The others were never published: theirs are ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """Where the rows are and what they hold."""

    file: str  # below a data folder
    sha256: str  # of what is in the file, unpacked and with lines that end in \n; empty: not checked, the file is made by the user
    rows: int  # in the file
    columns: str
    header: bool = True
    separator: str = ","  # a blank stands for any white space
    complete: bool = False  # rows with a missing cell are left out
    note: str = ""
    address: str = ""  # of the same rows, unpacked
    source: str = ""  # what to put in place by hand where there is no address


SETS = {
    "Adult": DataSet(
        "Adult/data.csv.gz",
        "a38d3e228cc9cc12eca35ea3439706906aae966372fdd791ef8f9c347b37cb77",
        32561,
        """age count, workclass categorical 7, weight positive, education ordinal 16, marital_status categorical 7, occupation categorical 14,
        relationship categorical 6, race categorical 5, sex binary, capital_gain positive, capital_loss positive, hours count""",
        header=False,
        address="https://github.com/adrianjav/lipschitz-standardization/raw/d97b9c06/datasets/Adult/data.csv",
    ),
    "Credit": DataSet(
        "Credit/data.csv.gz",
        "afc5a3e148f53a708f133387c802374415c91127ecd70fe9d7c5344147b6316f",
        30000,
        """limit positive, sex categorical 3, education categorical 7, marriage categorical 4, age count, status_1 ordinal 11, status_2 ordinal 11,
        status_3 ordinal 11, status_4 ordinal 11, status_5 ordinal 11, status_6 ordinal 11, bill_1 real, bill_2 real, bill_3 real, bill_4 real,
        bill_5 real, bill_6 real, paid_1 positive, paid_2 positive, paid_3 positive, paid_4 positive, paid_5 positive, paid_6 positive,
        default binary""",
        header=False,
        address="https://github.com/adrianjav/lipschitz-standardization/raw/d97b9c06/datasets/defaultCredit/data.csv",
    ),
    "Wine": DataSet(
        "Wine/data.csv.gz",
        "e53e2d65da18808d241fd0fd743b7a40fbf4117727a104c1a342a0a789a955fb",
        6497,
        """fixed_acidity positive, volatile_acidity positive, citric_acid positive, residual_sugar positive, chlorides positive,
        free_sulfur_dioxide positive, total_sulfur_dioxide positive, density positive, ph positive, sulphates positive, alcohol positive,
        quality count, colour binary""",
        header=False,
        address="https://github.com/adrianjav/lipschitz-standardization/raw/d97b9c06/datasets/Wine/data.csv",
    ),
    "Diamonds": DataSet(
        "Diamonds/data.csv.gz",
        "3b60396d61bbdf2b9ccf7fc3c222cb3d398eb948a2cc42fc6e3bb91384047656",
        53940,
        """index -, carat positive, cut categorical 5, color categorical 7, clarity categorical 8, depth real, table real, price real,
        x real, y real, z real""",
        address="https://github.com/adrianjav/heterogeneous_vaes/raw/12db362f/datasets/diamonds/data.csv",
    ),
    "Bank": DataSet(
        "Bank/data.csv.gz",
        "3dffda2dfb1f95401ddc5372d91ca128531b49ecd673a0913804865336103bae",
        41188,
        """index -, age real, job categorical 12, marital categorical 4, education categorical 8, default categorical 3, housing categorical 3,
        loan categorical 3, contact binary, month categorical 10, day_of_week categorical 5, duration real, campaign real, pdays real, previous real,
        poutcome categorical 3, emp_var_rate real, cons_price_idx real, cons_conf_idx real, euribor3m real, nr_employed real, y binary""",
        address="https://github.com/adrianjav/heterogeneous_vaes/raw/12db362f/datasets/bank/data.csv",
    ),
    "IMDB": DataSet(
        "IMDB/movies.csv.gz",
        "",
        58788,
        """title -, year count, length count, budget positive, rating real, votes count, r1 real, r2 real, r3 real, r4 real, r5 real, r6 real, r7 real,
        r8 real, r9 real, r10 real, mpaa categorical 4, action binary, animation binary, comedy binary, drama binary, documentary binary,
        romance binary, short binary""",
        note="a film without an MPAA rating counts as a missing cell",
        source="the table movies of the R package ggplot2movies, written as CSV",
    ),
    "HI": DataSet(
        "HI/HI.csv.gz",
        "a87562a8482c2366a91f02c9f2a87e75b711abd1182681ed812f4343a0151983",
        22272,
        """index -, whrswk count, hhi binary, whi binary, hhi2 binary, education categorical 6, race categorical 3, hispanic binary, experience real,
        kidslt6 count, kids618 count, husby positive, region categorical 4, wght positive""",
        address="https://github.com/vincentarelbundock/Rdatasets/raw/1dcc2bf5/csv/Ecdat/HI.csv",
    ),
    "rwm5yr": DataSet(
        "rwm5yr/rwm5yr.csv.gz",
        "d9f8b54a760b88c26296de82447db15698efe6672ccaeb8416cd5c36941254e2",
        19609,
        """index -, id -, docvis count, hospvis count, year categorical 5, edlevel categorical 4, age count, outwork binary, female binary,
        married binary, kids binary, hhninc positive, educ real, self binary, edlevel1 binary, edlevel2 binary, edlevel3 binary, edlevel4 binary""",
        address="https://github.com/vincentarelbundock/Rdatasets/raw/1dcc2bf5/csv/COUNT/rwm5yr.csv",
    ),
    "labour": DataSet(
        "labour/DAAG_cps1.csv.gz",
        "06bb86f71868bf92a85db7e172426cfc3f1f8d5bedcbaf784674a56e6810a73c",
        15992,
        """index -, trt -, age count, educ count, black binary, hisp binary, marr binary, nodeg binary, re74 real, re75 real,
        re78 real""",
        note="which data set the paper calls labour was never published; DAAG's cps1 with its earnings as real numbers gives the paper's errors (an ELBO .108 "
        "for .109, with GradNorm .068 for .063; as positive ones .145 and .137)",
        address="https://github.com/vincentarelbundock/Rdatasets/raw/1dcc2bf5/csv/DAAG/cps1.csv",
    ),
    "ElNino": DataSet(
        "ElNino/tao-all2.csv.gz",
        "",
        178080,
        """obs -, year -, month -, day -, date -, latitude real, longitude real, zon_winds real, mer_winds real, humidity real, air_temp real,
        ss_temp real""",
        complete=True,
        source="tao-all2.dat of the UCI repository (El Nino), with commas between cells, nothing where it has a dot, and a line with the columns' names",
    ),
    "Magic": DataSet(
        "Magic/magic04.csv.gz",
        "",
        19020,
        """length real, width real, size real, conc real, conc1 real, asym real, m3_long real, m3_trans real, alpha real, dist real, class -""",
        source="magic04.data of the UCI repository, with a line that names the columns",
    ),
    "BooNE": DataSet(
        "BooNE/MiniBooNE_PID.txt",
        "",
        130064,
        ", ".join(f"particle_{i} real" for i in range(1, 51)),
        separator=" ",
        source="MiniBooNE_PID.txt of the UCI repository, as it is",
    ),
}
