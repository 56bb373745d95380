"""Reading CSV files: column types, missing values, and every mistake with its file and line."""

import numpy as np
import pytest

from fl_jax.data.csv_table import parse_csv
from fl_jax.errors import FlJaxError

GOOD = """clinic,patient,age,stage,code,outcome
site 10,p1,50,II,1,dead
site 2,p2,NA,I,2,alive
site 2,p2, 61.5 ,?,1,alive

site 10,p3,-1e1,"I, late",2,dead
"""


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "study.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_columns_get_their_kind_and_missing_values_are_nan(tmp_path):
    parsed = parse_csv(write(tmp_path, GOOD, "utf-8-sig"), "clinic", "outcome", group="patient", categorical=["code"])
    age, stage, code = parsed.columns
    np.testing.assert_array_equal(age.values, [50, np.nan, 61.5, -10])
    assert age.levels == () and code.levels == ("1", "2") and stage.levels == ("I", "I, late", "II")
    np.testing.assert_array_equal(stage.values, [2, 0, np.nan, 1])
    assert parsed.site_names == ("site 2", "site 10") and parsed.site.tolist() == [1, 0, 0, 1]
    assert parsed.class_names == ("alive", "dead") and parsed.label.tolist() == [1, 0, 0, 1]
    assert parsed.group is not None and parsed.group.tolist() == [0, 1, 1, 2]


def test_numeric_labels_are_ordered_by_value_and_other_delimiters_work(tmp_path):
    parsed = parse_csv(write(tmp_path, "s;y;x\na;10;1\na;9;2\n"), "s", "y", delimiter=";")
    assert parsed.class_names == ("9", "10") and parsed.label.tolist() == [1, 0]


HEAD = "site,x,label\n"
NUMBERS = "".join(f"a,{i},{i % 2}\n" for i in range(20))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no records"),
        (HEAD, "holds no records"),
        ("site,x,y\na,1,0\n", "has no column 'label': its columns are 'site', 'x', 'y'"),
        ("site,x,x,label\na,1,2,0\n", "two columns named 'x'"),
        (HEAD + "a,1,0\na,2\n", "line 3: there are 2 values for 3 columns"),
        (HEAD + 'a,"1\n2",0\na,2,1,4\n', "line 4: there are 4 values"),
        (HEAD + 'a,"1"x,0\n', "line 2: this line is no CSV"),
        (HEAD + "a,1,0\n,2,1\n,2,1\n", "line 3: the site is missing; 2 records"),
        (HEAD + "a,1,0\na,2,\nb,2,1\n", "line 3: the label is missing; 1 records"),
        (HEAD + "a,1,0\na,2,1\nb,2,NA\nb,2,\n", "Site 'b' .* has no label at all"),
        (HEAD + "a,1,0\na,2,0\n", "Every label in column 'label' .* is '0'"),
        (HEAD + NUMBERS + "a,12..5,1\n", "line 22: column 'x' holds '12..5' where 20 of 21 values are numbers"),
        (HEAD + "a,1,0\na,inf,1\n", "line 3: column 'x' is infinite"),
        (HEAD + "".join(f"a,t{i},{i % 2}\n" for i in range(60)), "60 different texts"),
        (HEAD + "".join(f"a,1,{i}.5\n" for i in range(60)), "does not look like classes"),
        ("site,label\na,0\na,1\n", "has no feature"),
        ("site;x;label\na;1;0\n", "is the delimiter right"),
        (HEAD + 'a,"1,5",0\na,"2,5",1\na,3,1\n', "line 2: column 'x' holds '1,5', a number with a decimal comma"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(FlJaxError, match=message) as error:
        parse_csv(path, "site", "label")
    assert "study.csv" in str(error.value)


def test_missing_group_wrong_encoding_and_missing_file(tmp_path):
    with pytest.raises(FlJaxError, match="line 3: the group is missing"):
        parse_csv(write(tmp_path, "site,x,label,id\na,1,0,1\na,1,1,\n"), "site", "label", group="id")
    with pytest.raises(FlJaxError, match="not UTF-8"):
        parse_csv(write(tmp_path, HEAD + "Köln,1,0\n", "latin-1"), "site", "label")
    with pytest.raises(FlJaxError, match="different columns"):
        parse_csv(write(tmp_path, HEAD + "a,1,0\n"), "site", "site")
    with pytest.raises(FlJaxError, match="cannot be read"):
        parse_csv(tmp_path / "nowhere.csv", "site", "label")
    with pytest.raises(FlJaxError, match="cannot be read"):
        parse_csv(tmp_path, "site", "label")


def test_blank_lines_are_no_records_and_codes_with_an_underscore_no_numbers(tmp_path):
    text = "\n  \nsite,x,label\na,1_2,0\n \na,1_3,1\n\n"
    assert parse_csv(write(tmp_path, text), "site", "label").columns[0].levels == ("1_2", "1_3")
    with pytest.raises(FlJaxError, match="line 6: column 'x' is infinite"):
        parse_csv(write(tmp_path, text.replace("1_3", "inf").replace("1_2", "1")), "site", "label")


@pytest.mark.parametrize("delimiter", ["", ";;", "\n"])
def test_a_delimiter_is_one_character(tmp_path, delimiter):
    with pytest.raises(FlJaxError, match="delimiter must be one character"):
        parse_csv(write(tmp_path, GOOD), "clinic", "outcome", delimiter=delimiter)


def test_row_numbers_without_a_name_are_refused_unless_dropped(tmp_path):
    path = write(tmp_path, ",site,x,label\n0,a,1,0\n1,a,2,1\n")
    with pytest.raises(FlJaxError, match="Column 1 of .* has no name"):
        parse_csv(path, "site", "label")
    assert [column.name for column in parse_csv(path, "site", "label", drop=[""]).columns] == ["x"]
