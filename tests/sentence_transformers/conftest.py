"""A base model on disk, as embedding models have one."""

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Where sentence-transformers is missing, the tests are skipped before they ask for this.
    from tests.support.embedding_models import save_base

    return save_base(tmp_path_factory.mktemp("base"))
