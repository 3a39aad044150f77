"""Systems by the attentive survey's axes: read off what they are, and refused where an axis is not known."""

import pytest

import regard
from regard.catalog.axes import AXES, axes_of
from regard.catalog.registry import entries, entry
from regard.zoo.analysis.attentive_survey import FORMS


def test_names_are_found_by_what_they_do():
    both = regard.names(sequences="distinctive")
    assert {"softmax", "attentive-survey"} <= set(both) and "moba" not in both
    assert {"neighborhood", "swat", "halonet"} <= set(regard.names(positions="local"))
    assert {"moba", "routing-transformer", "prflash-saq"} <= set(regard.names(positions="hard", sequences="self"))
    assert "softmax" in regard.names(positions="soft") and "softmax" not in regard.names(positions="hard")
    assert regard.names(sequences="co") == ["attentive-survey"] == regard.names(sequences="co", positions="hard")
    assert "dhsa" in regard.names(abstraction="multi") and "cbam" in regard.names(representations="multi-dimensional")
    assert set(regard.names("mechanism", positions="hard")) == set(regard.names(positions="hard")) & set(regard.names())
    assert "cab" not in regard.names(sequences="self") and "cab" in regard.names(None)


def test_every_system_has_a_value_of_each_axis_but_experiments_of_sequences():
    for name, one in entries().items():
        found = axes_of(one)
        assert set(found) == set(AXES) and all(found[axis] <= set(values) for axis, values in AXES.items()), name
        assert all(found[axis] for axis in AXES if axis != "sequences"), name
        assert found["sequences"] or (one.kind not in ("mechanism", "policy", "module", "model") or not hasattr(one.factory, "forward")), (
            name
        )
    said = axes_of(entry("attentive-survey"))
    assert all(said[axis] == {own[axis] for _, own in FORMS.values()} for axis in AXES)


def test_unknown_axes_and_values_are_refused_with_the_known():
    with pytest.raises(regard.RegardError, match=r"'position'='hard'; expected some of sequences, .*Did you mean positions"):
        regard.names(position="hard")
    with pytest.raises(regard.RegardError, match=r"positions='har'; expected one of soft, hard, local"):
        regard.names(positions="har")
