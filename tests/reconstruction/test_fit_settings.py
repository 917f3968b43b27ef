"""Settings of the fit of every window."""

import pytest

from lit_recon.reconstruction.fit_settings import FitSettings


@pytest.mark.parametrize("rate", [0, 1, -1, "a", float("nan")])
def test_rates_of_retries_that_are_no_shares_of_the_learning_rate_are_refused(rate: object) -> None:
    FitSettings(retry_rates=[])
    FitSettings(retry_rates=[0.5, 0.25])
    with pytest.raises(ValueError, match="module.retry_rates=.*shares of the learning rate between 0 and 1"):
        FitSettings(retry_rates=[0.5, rate])


def test_all_that_is_wrong_is_in_one_message_that_says_what_is_allowed() -> None:
    with pytest.raises(ValueError) as caught:
        FitSettings(retry_rates=0.5, keep="first", patience=0)  # type: ignore[arg-type]
    for said in ("module.retry_rates=0.5: ", "keep=first: expected one of last, best", "patience=0: expected a number"):
        assert said in str(caught.value)


def test_a_recipe_names_what_is_not_usual_alone() -> None:
    assert FitSettings().describe() == {}
    given = FitSettings(retry_rates=(), keep="best", patience=2)
    assert given.describe() == {"retry_rates": "none", "keep": "best", "patience": "2"}
