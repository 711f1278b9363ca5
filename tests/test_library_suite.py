"""transformers' own tests on our models: those that fail are those that are known to be inapplicable."""

import pytest
import transformers

from tests.library_suite import EXCEPTIONS, ROOT, exceptions_table, failures, fetch_testers, run_pip, run_suite, summary


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tests_of_transformers_fail_only_where_they_cannot_apply():
    models = run_suite(fetch_testers(transformers.__version__))
    found = failures(models)
    unexpected = [
        f"{name}, {model}: {reason}"
        for name, of_models in found.items()
        for model, reason in of_models.items()
        if name not in EXCEPTIONS or model not in EXCEPTIONS[name].models
    ]
    assert not unexpected, "\n".join(unexpected)
    assert {name: frozenset(of_models) for name, of_models in found.items()} == {
        name: each.models for name, each in EXCEPTIONS.items()
    }, "EXCEPTIONS lists what passes by now"
    kinds = {model: [outcome.kind for outcome in tests.values()] for model, tests in models.items()}
    assert all(each.count("passed") >= 50 for each in kinds.values()), summary(models)


def test_few_tests_of_transformers_cannot_apply_and_each_has_a_reason():
    assert len(EXCEPTIONS) <= 8
    assert all(each.models and each.reason.endswith(".") for each in EXCEPTIONS.values())
    assert exceptions_table() in (ROOT / "docs/ecosystem.md").read_text(encoding="utf-8")


def test_where_there_is_no_index_the_reason_is_one_line():
    with pytest.raises(
        ValueError, match=r"^pip cannot get transformers==0\.0\.0 \(.*No matching distribution.*kept in"
    ):
        run_pip("download", "--no-index", "transformers==0.0.0")
