"""What is said of a profile that is refused."""

import pytest

from components.pipeline.profiles import load_profile
from univigu.errors import ConfigError


def refusal(spec):
    """The message of the error that loading the profile raises."""
    with pytest.raises(ConfigError) as raised:
        load_profile(spec)
    assert raised.value.exit_code == 78
    return str(raised.value)
