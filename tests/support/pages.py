"""Prefect's pages as a person uses them, in headless Chromium. Pictures of what was seen lie beside the test's other files."""

from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from playwright.sync_api import Page, Request, WebSocket, sync_playwright

from flows.services.credentials import USER
from tests.support.supervised_home import CHROMIUM, CHROMIUM_OPTIONS, House, await_


class Pages:
    def __init__(self, house: House, pictures: Path) -> None:
        if not CHROMIUM:
            pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
        self.house, self.pictures = house, pictures
        self.outside: list[
            str
        ] = []  # addresses on other machines that a page asked for, and its policy did not forbid
        pictures.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self.player = sync_playwright().start()
        self.browser = self.player.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        login = {"username": USER, "password": self.house.password, "origin": self.house.mlflow}
        self.page: Page = self.browser.new_page(
            viewport={"width": 1300, "height": 1000}, http_credentials=login
        )
        self.page.set_default_timeout(20_000)
        self.page.on("requestfinished", self._note)
        self.page.on("requestfailed", self._note)
        self.page.on("websocket", lambda socket: self._note(socket))
        self.page.goto(f"{self.house.prefect}/login")
        self.page.locator("input").first.fill(f"{USER}:{self.house.password}")
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(lambda url: "login" not in url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self.picture("failed")
        self.browser.close()
        self.player.stop()

    def _note(self, request: Request | WebSocket) -> None:
        is_sent = isinstance(request, WebSocket) or request.failure != "csp"
        if is_sent and urlsplit(request.url).hostname not in ("127.0.0.1", None):
            self.outside.append(request.url)

    def picture(self, name: str) -> None:
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def trigger(self, deployment: UUID, label: str, value: str) -> UUID:
        """Run -> Custom run, change one nested parameter, Submit; gives the run."""
        self.page.goto(f"{self.house.prefect}/deployments/deployment/{deployment}")
        self.page.locator("button.run-menu__run-button").first.click()
        self.page.locator(".p-overflow-menu-item", has_text="Custom").first.click()
        field = self.page.locator(f"xpath=//*[contains(text(), '{label}')]/following::input[1]").first
        field.scroll_into_view_if_needed()
        field.fill(value)
        self.picture("form")
        before = {run.id for run in self._runs(deployment)}
        self.page.get_by_role("button", name="Submit").click()
        await_(lambda: {run.id for run in self._runs(deployment)} - before)
        (found,) = {run.id for run in self._runs(deployment)} - before
        return found

    def _runs(self, deployment: UUID) -> list:
        with self.house.client() as client:
            return [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment]

    def open_run(self, run: UUID) -> None:
        self.page.goto(f"{self.house.prefect}/runs/flow-run/{run}")
        self.page.wait_for_timeout(4000)  # the graph is drawn on a canvas, which says nothing when it is done

    def retry(self, run: UUID) -> None:
        self.open_run(run)
        self.picture("before-retry")
        self.page.get_by_role("button", name="Retry").first.click()
        self.page.locator(".p-modal").get_by_role("button", name="Retry").click()

    def cancel(self, run: UUID) -> None:
        self.open_run(run)
        self.picture("before-cancel")
        self.page.get_by_role("button", name="Cancel").first.click()
        self.page.locator(".p-modal").get_by_role("button", name="Confirm").click()
