"""Predictions are kept, shown beside the answer, and absent where nobody guesses."""

import json
import subprocess
import sys

import pytest

from qlearn import course
from qlearn.course import predictions


def ask(key="key"):
    return predictions.predict("error in %", low=0, high=100, key=key)


def test_a_guess_is_kept_and_revealed(capsys, data_folder):
    asked = ask()
    asked.number.value = 20
    asked.button.click()
    assert json.loads((data_folder / "predictions.json").read_text()) == {"key": 20.0}
    course.reveal("key", 10, unit="%")
    assert capsys.readouterr().out == "your guess: 20 %; measured: 10 %; 2 times too much\n"


def test_slider_and_number_move_together():
    asked = ask()
    asked.slider.value = 12
    assert asked.number.value == 12


def test_a_guess_survives_a_restart(data_folder):
    asked = ask()
    asked.number.value = 37
    asked.commit()
    code = "from qlearn import course; course.reveal('key', 37.1)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "your guess: 37; measured: 37.1; within 5 %\n"


def test_the_first_guess_stays_and_locks_the_question():
    first, second = ask(), ask()
    first.number.value = 20
    first.commit()
    second.number.value = 90
    second.commit()
    assert predictions.guess_of("key") == 20
    assert second.number.value == 20 and second.number.disabled and second.button.disabled
    again = ask()
    assert again.slider.value == 20 and again.slider.disabled and "20" in again.note.value


def test_keys_do_not_mix():
    ask("a").commit()
    assert predictions.guess_of("b") is None


def test_without_a_guess_only_the_measurement_is_printed(capsys):
    course.reveal("absmax-4bit", 11.2345, unit="%")
    assert capsys.readouterr().out == "no guess yet for 'absmax-4bit'; measured: 11.23 %\n"


def test_the_plain_text_does_not_depend_on_the_guess():
    asked = ask()
    before = asked._repr_mimebundle_()
    asked.commit()
    assert before["text/plain"] == asked._repr_mimebundle_()["text/plain"] == "Prediction key: error in % (0 to 100)"
    assert "application/vnd.jupyter.widget-view+json" in before


def test_whole_numbers_are_asked_for_in_whole_steps():
    asked = course.predict("how many bits", low=1, high=16, key="bits")
    assert asked.slider.step == 1 and asked.slider.value == 8
    assert course.predict("a share", low=0, high=1, key="share").slider.step == 0.01


@pytest.mark.parametrize(
    ("guess", "answer", "verdict"),
    [
        (5, 10, "2 times too little"),
        (-20, -10, "2 times too much"),
        (0, 3, "off by 3"),
        (-1, 1, "off by 2"),
        (0, 0, "off by 0"),
    ],
)
def test_how_far_off_is_said_in_words(guess, answer, verdict):
    assert predictions._verdict(guess, answer) == verdict


@pytest.mark.parametrize("content", [b'{"key": 1', b"[1, 2]", b"\xff\xfe", b"null"])
def test_a_broken_file_is_moved_aside_with_a_warning(content, data_folder):
    data_folder.mkdir(exist_ok=True)
    (data_folder / "predictions.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"predictions\.json\.broken"):
        asked = ask()
    assert (data_folder / "predictions.json.broken").read_bytes() == content
    asked.commit()
    assert predictions.guess_of("key") == 50


@pytest.mark.parametrize("entry", ['"twenty"', "[1]", "null"])
def test_an_entry_that_is_no_number_counts_as_no_guess(entry, data_folder):
    data_folder.mkdir(exist_ok=True)
    (data_folder / "predictions.json").write_text(f'{{"key": {entry}}}')
    assert predictions.guess_of("key") is None
    ask().commit()
    assert predictions.guess_of("key") == 50


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, float("inf")), (float("nan"), 1)])
def test_an_empty_range_is_refused(low, high):
    with pytest.raises(ValueError, match="low < high"):
        course.predict("anything", low=low, high=high, key="key")


@pytest.mark.parametrize("answer", [float("nan"), float("inf")])
def test_an_answer_must_be_finite(answer):
    with pytest.raises(ValueError, match="finite"):
        course.reveal("key", answer)


def test_a_question_is_shown_as_text():
    asked = course.predict("is <b>2 < 3</b>?", low=0, high=1, key="html")
    assert "is &lt;b&gt;2 &lt; 3&lt;/b&gt;?" in asked.children[0].value
