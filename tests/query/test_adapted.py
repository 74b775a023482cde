"""One query never mixes spaces: old and adapted slices together, slices of other models not at all."""

from __future__ import annotations

import numpy as np
import pytest
from support.adapted import NEW, TECHNOLOGY, adapt, role_of, tokens
from support.atlases import (
    N_CELLS,
    SLICES,
    copied,
    run_here,
    with_settings,
)

from lloki_atlas.errors import InputError
from lloki_atlas.query import nearest_cells, select_cells
from lloki_atlas.stages.pipeline import plan
from lloki_atlas.stages.status import status
from lloki_atlas.store.catalog import open_catalog


@pytest.fixture
def after(adapted, tmp_path):
    return copied(adapted, tmp_path / "atlas")


def test_old_and_adapted_slices_are_answered_together(adapted):
    catalog = open_catalog(adapted)
    asked = select_cells(catalog, slices=[NEW])
    found = nearest_cells(catalog, asked, n_neighbors=5, exclude_slice="own").to_dataframe()
    assert set(found["slice_id"]) <= set(SLICES)
    assert len(found) == 5 * N_CELLS
    back = nearest_cells(catalog, select_cells(catalog, slices=SLICES), n_neighbors=3 * N_CELLS - 1).to_dataframe()
    assert set(back["slice_id"]) == {NEW, *SLICES}


def test_a_slice_of_an_older_autoencoder_is_left_out_and_said_so(after):
    changed = with_settings(after, "autoencoder", n_epochs=1)
    done = run_here(plan(changed, slices=SLICES))
    with pytest.warns(UserWarning, match=f"slices left out: {NEW}; their X_lloki was made with .* another model"):
        found = nearest_cells(done, np.ones(128), n_neighbors=3 * N_CELLS).to_dataframe()
    assert set(found["slice_id"]) == set(SLICES)
    assert np.isnan(select_cells(done, slices=[NEW]).embedding()).all()
    (part,) = (part for part in status(done)["slices"] if part["slice_id"] == NEW)
    # what it was encoded with, not what it should be encoded with
    assert part["autoencoder"] == after.state.models["autoencoder"][:8]
    assert part["token"] == tokens(after)[role_of(after)][:8]


def test_cells_of_a_slice_of_an_older_autoencoder_are_no_query(after):
    done = run_here(plan(with_settings(after, "autoencoder", n_epochs=1), slices=SLICES))
    with pytest.raises(InputError, match=f"{N_CELLS} of {N_CELLS} query cells have no embedding"):
        nearest_cells(done, select_cells(done, slices=[NEW]))


def test_a_selection_of_another_token_is_refused(after, client):
    done = adapt(after, client, random_state=7)
    with pytest.raises(InputError, match=f"whose token of '{TECHNOLOGY}' is another one: select the cells in version"):
        nearest_cells(done, select_cells(after, slices=[NEW]))
    assert len(nearest_cells(done, select_cells(after, slices=SLICES)).to_dataframe())
    assert len(nearest_cells(done, select_cells(after, slices=[NEW]), embedding="X_fp").to_dataframe())
