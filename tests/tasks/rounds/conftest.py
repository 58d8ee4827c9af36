"""Give each test a home and MLflow's SQLite database of its own, as tests of promotion have them."""

from tests.tasks.promotion.conftest import home, tracker

__all__ = ["home", "tracker"]  # fixtures
