"""Use Prefect's pages as a user does, in headless Chromium. Screenshots lie beside the test's other files."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit
from uuid import UUID

from playwright.sync_api import Page, Request, WebSocket
from prefect.client.schemas.objects import FlowRun

from flows.services.credentials import USER
from tests.support.fake_programs import wait_until
from tests.support.installation import REQUEST_SECONDS, Installation
from tests.support.pages.browser import open_browser


class ServerAddresses(Protocol):
    """Where both servers are, and the password of their user."""

    @property
    def prefect(self) -> str: ...
    @property
    def mlflow(self) -> str: ...
    @property
    def password(self) -> str: ...


class PrefectPages:
    """A browser with a user who has logged in to Prefect's pages."""

    def __init__(self, servers: ServerAddresses, screenshots: Path) -> None:
        self.servers, self.screenshots = servers, screenshots
        # URLs on other machines that a page has requested and the page's policy has not blocked
        self.outside: list[str] = []
        screenshots.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            browser = stack.enter_context(open_browser())
            login = {"username": USER, "password": self.servers.password, "origin": self.servers.mlflow}
            self.page: Page = browser.new_page(
                viewport={"width": 1300, "height": 1000}, http_credentials=login
            )
            self.page.set_default_timeout(60_000)
            self.page.on("requestfinished", self._note)
            self.page.on("requestfailed", self._note)
            self.page.on("websocket", lambda socket: self._note(socket))
            self.page.goto(f"{self.servers.prefect}/login")
            self.page.locator("input").first.fill(f"{USER}:{self.servers.password}")
            self.page.keyboard.press("Enter")
            self.page.wait_for_url(lambda url: "login" not in url)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self.screenshot("failed")
        self._opened.close()

    def _note(self, request: Request | WebSocket) -> None:
        is_sent = isinstance(request, WebSocket) or request.failure != "csp"
        if is_sent and urlsplit(request.url).hostname not in ("127.0.0.1", None):
            self.outside.append(request.url)

    def leave(self) -> None:
        """Show nothing: while a run's page is open its graph is drawn again and again, by half a core."""
        self.page.goto("about:blank")

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=self.screenshots / f"{name}.png")


def trigger_run(
    pages: PrefectPages, installation: Installation, deployment: UUID, label: str, value: str
) -> UUID:
    """Click Run -> Custom run, change one nested parameter, submit; return the new run's id."""
    page = pages.page
    page.goto(f"{installation.prefect}/deployments/deployment/{deployment}")
    page.locator("button.run-menu__run-button").first.click()
    page.locator(".p-overflow-menu-item", has_text="Custom").first.click()
    field = page.locator(f"xpath=//*[contains(text(), '{label}')]/following::input[1]").first
    field.scroll_into_view_if_needed()
    field.fill(value)
    pages.screenshot("form")
    before = {run.id for run in installation.runs_of(deployment)}
    page.get_by_role("button", name="Submit").click()

    def new_runs() -> list[FlowRun]:
        return [run for run in installation.runs_of(deployment) if run.id not in before]

    (run,) = wait_until(new_runs, every=REQUEST_SECONDS)
    pages.leave()
    return run.id


def open_run(pages: PrefectPages, run_id: UUID) -> None:
    """Open the page of a flow run, and wait until its graph is drawn."""
    pages.page.goto(f"{pages.servers.prefect}/runs/flow-run/{run_id}")
    pages.page.wait_for_timeout(4000)  # the graph is drawn on a canvas, which does not tell when it is done


def retry_run(pages: PrefectPages, run_id: UUID) -> None:
    """Click Retry in the page of a flow run, and confirm."""
    open_run(pages, run_id)
    pages.screenshot("before-retry")
    pages.page.get_by_role("button", name="Retry").first.click()
    pages.page.locator(".p-modal").get_by_role("button", name="Retry").click()


def cancel_run(pages: PrefectPages, run_id: UUID) -> None:
    """Click Cancel in the page of a flow run, and confirm."""
    open_run(pages, run_id)
    pages.screenshot("before-cancel")
    pages.page.get_by_role("button", name="Cancel").first.click()
    pages.page.locator(".p-modal").get_by_role("button", name="Confirm").click()
