"""Models of `transformers`, made and saved once for all tests of a process."""

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Case -> (transformers model, the directory it saved itself to)."""
    from tests.models.references import CASES, make_reference

    made = {}

    def get(case):
        if case not in made:
            family, fields = CASES[case]
            reference = make_reference(family, **fields)
            directory = tmp_path_factory.mktemp(case)
            reference.save_pretrained(directory)
            made[case] = reference, directory
        return made[case]

    return get
