"""MIMIC-IV from tables made in its layout: which stays are chosen, their labels, and their features by another computation."""

import csv
import gzip

import pytest
import torch

from mmfast.data import DataError, mimic, modalities

HEADS = {
    "hosp/patients": "subject_id gender anchor_age anchor_year anchor_year_group dod",
    "hosp/admissions": "subject_id hadm_id admittime dischtime deathtime admission_type race hospital_expire_flag",
    "hosp/diagnoses_icd": "subject_id hadm_id seq_num icd_code icd_version",
    "hosp/procedures_icd": "subject_id hadm_id seq_num chartdate icd_code icd_version",
    "hosp/prescriptions": "subject_id hadm_id starttime stoptime drug",
    "hosp/d_labitems": "itemid label fluid category",
    "hosp/labevents": "labevent_id subject_id hadm_id specimen_id itemid charttime storetime value valuenum flag",
    "note/discharge": "note_id subject_id hadm_id text",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the tables, of which each row is a dict of the cells that matter; every second one is packed."""
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(**tables):
        for i, (file, head) in enumerate(HEADS.items()):
            name = file.split("/")[1]
            if name == "discharge" and name not in tables:
                continue
            path = tmp_path / "MIMIC-IV" / (file + (".csv.gz" if i % 2 else ".csv"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", newline="") if i % 2 else path.open("w", newline="") as out:
                table = csv.DictWriter(out, head.split())
                table.writeheader()
                table.writerows(tables.get(name, []))
        return tmp_path / "MIMIC-IV"

    return write


def patient(number, age=50, year=2150, dod=""):
    return {"subject_id": number, "gender": "F", "anchor_age": age, "anchor_year": year, "dod": dod}


def admission(subject, number, start, end, expired=0):
    return {"subject_id": subject, "hadm_id": number, "admittime": start, "dischtime": end, "hospital_expire_flag": expired}


JUNE = ("2150-06-01 08:00:00", "2150-06-05 12:00:00")  # discharged on day 156 of the year
CHOSEN = [  # (age at 2150, date of death, stays), the labels (mortality, readmission) of those that are chosen
    (50, "", [JUNE], {0: (None, None)}),
    (50, "2150-09-03", [JUNE], {0: (True, None)}),  # midnight comes 89.5 days after discharge
    (50, "2150-09-04", [JUNE], {0: (True, None)}),  # 90.5 days: 90 whole ones
    (50, "2150-09-05", [JUNE], {0: (False, None)}),  # 91 whole ones
    (50, "2150-06-05", [JUNE], {0: (True, None)}),  # on the day of discharge
    (50, "", [JUNE, ("2150-06-21 11:00:00", "2150-06-22 11:00:00")], {0: (None, True), 1: (None, None)}),  # 15 whole days
    (50, "", [JUNE, ("2150-06-21 12:00:00", "2150-06-22 11:00:00")], {0: (None, False), 1: (None, None)}),  # 16 days
    (50, "", [("2150-09-04 11:00:00", "2150-09-05 11:00:00"), JUNE], {0: (None, None), 1: (None, False)}),  # 90 days; not in order
    (50, "", [JUNE, ("2150-09-04 12:00:00", "2150-09-05 11:00:00")], {0: (False, False), 1: (None, None)}),  # 91: lived
    (50, "2151-01-01", [JUNE, ("2150-06-06 11:00:00", "2150-06-07 11:00:00")], {0: (False, True), 1: (False, None)}),
    (50, "2150-06-06", [(*JUNE, 1)], {}),  # died in hospital
    (50, "", [JUNE, ("2150-06-06 11:00:00", "2150-06-07 11:00:00", 1)], {0: (None, True)}),  # excluded, but a readmission
    (50, "", [("2150-06-01 08:00:00", "2150-06-11 08:00:00")], {0: (None, None)}),  # ten days
    (50, "", [("2150-06-01 08:00:00", "2150-06-11 08:01:00")], {}),
    (17, "", [JUNE], {}),
    (18, "", [JUNE], {0: (None, None)}),
    (17, "", [("2151-06-01 08:00:00", "2151-06-05 12:00:00")], {0: (None, None)}),  # 18 by the year of admission
    (89, "", [JUNE], {0: (None, None)}),
    (90, "", [JUNE], {}),
    (89, "", [("2151-06-01 08:00:00", "2151-06-05 12:00:00")], {}),
]


def test_stays_are_chosen_and_labelled_as_muse_does(write):
    patients, admissions, expected = [], [], {}
    for i, (age, dod, all_stays, labels) in enumerate(CHOSEN):
        patients.append(patient(i, age, dod=dod))
        admissions += [admission(i, f"{i}.{j}", *stay) for j, stay in enumerate(all_stays)]
        expected |= {f"{i}.{j}": (str(i), *label) for j, label in labels.items()}
    write(patients=patients, admissions=admissions[::-1])
    found = {name: (stay.patient, stay.mortality, stay.readmission) for name, stay in mimic.stays().items()}
    assert found == expected


N = 60
DRUGS = ["Aspirin", "Heparin", "Insulin"]


def hospital():
    """60 patients of one stay each, every second one dies within 90 days; what a stay has depends on its number."""
    tables = {name.split("/")[1]: [] for name in HEADS}
    tables["d_labitems"] = [
        {"itemid": 1, "label": "Sodium, Whole Blood"},
        {"itemid": 2, "label": "Glucose"},
        {"itemid": 3, "label": "pH"},
        {"itemid": 4, "label": "Lactate"},
    ]
    for i in range(N):
        of = {"subject_id": i, "hadm_id": 100 + i}
        tables["patients"].append(patient(i, dod="2150-07-01" if i % 2 else "2151-07-01"))
        tables["admissions"].append(admission(i, 100 + i, *JUNE))
        tables["diagnoses_icd"] += [of | {"icd_version": v, "icd_code": f"{i % 3}"} for v in (9, 10)]
        tables["procedures_icd"] += [
            of | {"icd_version": 9, "icd_code": "0", "chartdate": day} for day in ("2150-06-05", "2150-06-06")[i % 2 :]
        ]
        drug = DRUGS[i % 3] if i % 2 else DRUGS[i % 3].upper()
        tables["prescriptions"].append(of | {"drug": drug, "starttime": "2150-06-05 12:00:00"})
        tables["prescriptions"].append(of | {"drug": "late", "starttime": "2150-06-05 12:00:01"})
        tables["prescriptions"].append(of | {"drug": "some time", "starttime": ""})
        if i % 4:
            times = ("2150-06-03 10:00:00", 2.0 * i, ""), ("2150-06-02 10:00:00", 7.0, "abnormal"), ("2150-06-05 12:00:01", 1e6, "abnormal")
            tables["labevents"] += [of | {"itemid": 1, "storetime": t, "valuenum": v, "flag": flag} for t, v, flag in times]
            tables["labevents"].append(of | {"itemid": 2, "storetime": times[0][0], "valuenum": 5.0})  # no item of ours
            tables["labevents"].append(of | {"itemid": 3, "storetime": times[0][0], "valuenum": ""})  # no number
        if i % 4 == 2:
            tables["labevents"].append(of | {"itemid": 4, "storetime": "2150-06-03 10:00:00", "valuenum": -i, "flag": "abnormal"})
        course = (
            f"Brief Hospital Course:\nStable, w{'abc'[i % 3] * 3} ___ 12\nMedications on Admission:\nnothing else" if i % 5 else "No course"
        )
        tables["discharge"].append(of | {"text": f"Sex: F\n{course}"})
    tables["labevents"].append({"subject_id": 0, "hadm_id": "", "itemid": 1, "storetime": "2150-06-03 10:00:00", "valuenum": 3.0})
    return tables


def stay_numbers(split):
    """Which stays are in the parts, in their order: by the patients' permutation, then by that of the stays."""
    generator = torch.Generator().manual_seed(4)
    order, mixed = (torch.randperm(N, generator=generator).tolist() for _ in range(2))
    return [[i for i in mixed if i in part] for part in (order[:42], order[42:48], order[48:])]


def test_features_are_those_of_the_tables(write):
    write(**hospital())
    split = modalities.load("MIMIC-IV", 4)
    train = torch.tensor(stay_numbers(split)[0])
    with_sodium = train[train % 4 != 0].double()
    with_lactate = -train[train % 4 == 2].double()
    # by how many training stays have them, then by name
    count = {f"diagnosis {v} {c}": int((train % 3 == c).sum()) for v in (9, 10) for c in range(3)}
    count |= {f"drug {drug.lower()}": int((train % 3 == c).sum()) for c, drug in enumerate(DRUGS)}
    count["procedure 9 0"] = int((train % 2 == 0).sum())
    codes = sorted(count, key=lambda code: (-count[code], code))
    words_of = {"stable": lambda i: True, **{f"w{c * 3}": lambda i, n=n: i % 3 == n for n, c in enumerate("abc")}}
    words = {word: sum(i % 5 > 0 and has(i) for i in train.tolist()) for word, has in words_of.items()}
    words = sorted(words, key=lambda word: (-words[word], word))
    for part, numbers in zip((split.train, split.valid, split.test), stay_numbers(split), strict=True):
        assert part.target.tolist() == [i % 2 for i in numbers]
        for row, i in enumerate(numbers):
            has = {f"diagnosis 9 {i % 3}", f"diagnosis 10 {i % 3}", f"drug {DRUGS[i % 3].lower()}"} | (
                {"procedure 9 0"} if i % 2 == 0 else set()
            )
            assert part.inputs["codes"][row].tolist() == [float(code in has) for code in codes]
            sodium = (2 * i - 2 * with_sodium.mean()) / (2 * with_sodium).std() if i % 4 else torch.tensor(0.0)
            lactate = (-i - with_lactate.mean()) / with_lactate.std() if i % 4 == 2 else torch.tensor(0.0)
            torch.testing.assert_close(
                part.inputs["labs"][row], torch.stack([sodium, lactate, torch.tensor(0), torch.tensor(i % 4 == 2)]).float()
            )
            assert part.inputs["notes"][row].tolist() == [float(i % 5 > 0 and words_of[word](i)) for word in words]
            assert [bool(part.present[name][row]) for name in ("codes", "labs", "notes")] == [True, i % 4 > 0, i % 5 > 0]
    assert (split.classes, split.name) == (2, "MIMIC-IV")


def test_only_the_most_frequent_codes_of_training_are_kept(write, monkeypatch):
    write(**hospital())
    monkeypatch.setattr(mimic, "CODES", 2)
    split = mimic.load(4)
    assert split.train.inputs["codes"].shape[1] == 2
    train = torch.tensor(stay_numbers(split)[0])
    counts = [(train % 2 == 0).sum(), *((train % 3 == c).sum() for c in range(3) for _ in range(3))]  # procedures; diagnoses and drugs
    assert split.train.inputs["codes"].sum(0).tolist() == sorted(map(int, counts))[:-3:-1]


def test_test_rows_do_not_reach_the_training_rows(write):
    """Other codes, values and words of test patients change nothing in training."""
    tables = hospital()
    write(**tables)
    before = mimic.load(4)
    test = {100 + i for i in stay_numbers(before)[2]}
    for name, cell, value in (("labevents", "valuenum", 1e9), ("prescriptions", "drug", "poison"), ("diagnoses_icd", "icd_code", "poison")):
        for row in tables[name]:
            if row["hadm_id"] in test:
                row[cell] = value
    tables["labevents"] += [{"hadm_id": stay, "itemid": 3, "storetime": JUNE[0], "valuenum": 1.0, "flag": ""} for stay in test]
    for row in tables["discharge"]:
        if row["hadm_id"] in test:
            row["text"] = "Brief Hospital Course: poison Medications on Admission:"
    write(**tables)
    after = mimic.load(4)
    for name, x in before.train.inputs.items():
        assert torch.equal(x, after.train.inputs[name])
        assert torch.equal(before.valid.inputs[name], after.valid.inputs[name])
    assert after.test.inputs["labs"].max() > 1e3 and after.test.inputs["notes"].sum() == 0


def test_stays_of_a_patient_stay_together_and_unlabelled_ones_are_left_out(write):
    tables = hospital()
    tables["admissions"] += [admission(i, 200 + i, "2150-06-10 08:00:00", "2150-06-11 08:00:00") for i in range(0, N, 2)]
    tables["diagnoses_icd"] = [{"hadm_id": 100 * k + i, "icd_version": 9, "icd_code": i} for i in range(N) for k in (1, 2)]
    tables |= {"prescriptions": [], "procedures_icd": []}
    write(**tables)
    split = mimic.load(4)
    assert len(split.train) + len(split.valid) + len(split.test) == N * 3 // 2
    assert split.train.inputs["codes"].shape == (len(split.train), 42)  # a code of each patient's own, in training in all their stays
    assert split.train.inputs["codes"].sum() == len(split.train) and split.test.inputs["codes"].sum() == 0
    split = mimic.load(4, "readmission")  # known of the first stays of every second patient alone
    assert (len(split.train), len(split.valid), len(split.test)) == (21, 3, 6)
    assert torch.cat([split.train.target, split.valid.target, split.test.target]).all() and split.name == "MIMIC-IV-readmission"


def test_notes_may_be_left_out(write):
    tables = hospital()
    del tables["discharge"]
    write(**tables)
    assert list(mimic.load(4).train.inputs) == ["codes", "labs"]


def test_what_is_missing_or_wrong_is_said(write):
    with pytest.raises(
        DataError, match=r"there is no MIMIC-IV/hosp/patients.csv.*d_labitems.csv.*physionet.org/content/mimiciv.*mimic-iv-note"
    ):
        modalities.load("MIMIC-IV", 0)
    tables = hospital()
    folder = write(**tables)
    with pytest.raises(ValueError, match="task is 'length', expected one of mortality, readmission"):
        mimic.load(0, "length")
    labs = folder / "hosp/labevents.csv"
    whole = labs.read_text()
    labs.write_text(whole.replace("storetime", "time", 1))
    with pytest.raises(DataError, match="labevents.csv has the columns .*, expected hadm_id, itemid, storetime"):
        mimic.load(0)
    labs.write_text(whole.replace(",2.0,", ",seven,"))
    with pytest.raises(DataError, match="'seven' where a number is expected"):
        mimic.load(0)
    labs.write_text(whole + "1,2\n")
    with pytest.raises(DataError, match="labevents.csv cannot be read"):
        mimic.load(0)
    labs.unlink()
    with pytest.raises(DataError, match="there is no MIMIC-IV/hosp/labevents.csv, each"):
        mimic.load(0)
    write(**tables | {"patients": tables["patients"][1:]})
    with pytest.raises(DataError, match="patient 0 of admissions is not in patients"):
        mimic.load(0)
    write(**tables | {"admissions": [admission(1, 1, "in June", JUNE[1])]})
    with pytest.raises(DataError, match="the time 'in June', expected"):
        mimic.load(0)
    write(**tables | {"admissions": tables["admissions"][:2]})
    with pytest.raises(DataError, match="2 patients with a known label, too few"):
        mimic.load(0)
    packed = folder / "hosp/admissions.csv.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match="admissions.csv.gz cannot be read"):
        mimic.load(0)
