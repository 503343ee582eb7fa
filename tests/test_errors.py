import pytest

from errors import ArgumentError, InputError, UserError, advice, flag_names


def test_messages_are_one_visible_line():
    assert str(UserError("a\nb\x1b[2J\u2028\ud800 é")) == r"a\nb\x1b[2J\u2028\ud800 é"


def test_argument_error_names_the_argument():
    error = ArgumentError("lr", 2.5, "too high")
    assert str(error) == "lr 2.5: too high" and isinstance(error, InputError)
    assert (error.argument, error.value, error.problem) == ("lr", 2.5, "too high")


def test_flag_names():
    with pytest.raises(UserError) as caught, flag_names(name="base_model"):
        raise ArgumentError("name", "x", "no such model")
    assert str(caught.value) == "--base_model x: no such model"
    assert not isinstance(caught.value, InputError)


def test_flags_are_named_like_their_argument_by_default():
    with pytest.raises(UserError) as caught, flag_names(name="base_model"):
        raise ArgumentError("lr", 2.5, "too high")
    assert str(caught.value) == "--lr 2.5: too high"


@pytest.mark.parametrize("error", [UserError("x"), InputError("x"), ValueError("x")])
def test_flag_names_passes_on_other_errors(error: Exception):
    with pytest.raises(type(error)) as caught, flag_names():
        raise error
    assert caught.value is error


def test_advice():
    with pytest.raises(UserError) as caught, advice("run it again"):
        raise InputError("f.npz is damaged")
    assert str(caught.value) == "f.npz is damaged: run it again"
    assert not isinstance(caught.value, InputError)


def test_advice_on_an_argument_leaves_it_to_be_named():
    with pytest.raises(UserError) as caught, flag_names(size="max_len"), advice("lower it"):
        raise ArgumentError("size", 9, "too large")
    assert str(caught.value) == "--max_len 9: too large; lower it"


def test_the_innermost_context_handles_an_error():
    with pytest.raises(UserError) as caught, advice("no"), flag_names(size="max_len"):
        raise ArgumentError("size", 9, "too large")
    assert str(caught.value) == "--max_len 9: too large"
    with pytest.raises(UserError) as caught, advice("no"), advice("yes"):
        raise InputError("x")
    assert str(caught.value) == "x: yes"


@pytest.mark.parametrize("error", [UserError("x"), ValueError("x")])
def test_advice_passes_on_other_errors(error: Exception):
    with pytest.raises(type(error)) as caught, advice("no"):
        raise error
    assert caught.value is error
