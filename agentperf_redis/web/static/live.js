// Keeps a page up to date: the server sends the content of <main> again and again, and this script puts it in place.
// Without this script, the page shows the numbers of the time when it was loaded.
"use strict";

(() => {
  const PAUSED = "agentperf-paused";
  const address = document.body.dataset.live;
  const main = document.getElementById("main");
  if (!address || !main || !("EventSource" in window)) return;

  let source = null;
  let lostAt = null;
  let held = null; // the content that arrived while the user was selecting text or had a list open

  const paused = () => sessionStorage.getItem(PAUSED) === "yes";
  const clock = () => new Date().toISOString().slice(11, 19) + " UTC";

  function show() {
    const state = document.getElementById("live-state");
    const button = document.getElementById("live-button");
    if (button) {
      button.hidden = false;
      button.textContent = paused() ? "Resume" : "Pause";
      button.setAttribute("aria-label", paused() ? "Resume live updates" : "Pause live updates");
    }
    const news = paused()
      ? "Live updates are paused"
      : lostAt
        ? `No connection to this dashboard since ${lostAt}, trying again`
        : "";
    if (state && news) state.textContent = news;
    // Screen readers read this aloud whenever it changes.
    const aloud = document.getElementById("live-news");
    if (aloud && aloud.textContent !== news) aloud.textContent = news;
  }

  function busy() {
    const active = document.activeElement;
    const typing = active && main.contains(active) && active.matches("select, input:not([type=search])");
    const selection = document.getSelection();
    const selecting = selection && !selection.isCollapsed && main.contains(selection.anchorNode);
    return Boolean(typing || selecting || main.querySelector("button:active"));
  }

  // Returns how an element can be found in the next content: by its id, or as a link by its address.
  function findAgain(element) {
    if (!element || element === document.body) return () => null;
    if (element.id) return () => document.getElementById(element.id);
    const address = element.getAttribute("href");
    if (address === null) return () => null;
    const same = (root) => [...root.querySelectorAll("a[href]")].filter((each) => each.getAttribute("href") === address);
    const place = same(main).indexOf(element);
    return () => same(main)[place] || null;
  }

  function replace(html) {
    if (busy()) {
      held = html;
      return;
    }
    held = null;
    const next = new DOMParser().parseFromString(html, "text/html");
    const content = next.getElementById("main") || next.body;
    const refocus = main.contains(document.activeElement) ? findAgain(document.activeElement) : null;
    const open = [...main.querySelectorAll("details[open][id]")].map((each) => each.id);
    const scrolled = [...main.querySelectorAll(".scroll")].map((each) => [each.scrollLeft, each.scrollTop]);
    // A form in use stays, with the text in it.
    for (const old of main.querySelectorAll("form[data-keep][id]")) {
      const fresh = content.querySelector("#" + CSS.escape(old.id));
      if (fresh) fresh.replaceWith(old);
    }
    main.replaceChildren(...content.childNodes);
    for (const id of open) {
      const details = document.getElementById(id);
      if (details) details.open = true;
    }
    main.querySelectorAll(".scroll").forEach((each, number) => {
      if (scrolled[number]) [each.scrollLeft, each.scrollTop] = scrolled[number];
    });
    const again = refocus && refocus();
    if (again) again.focus({ preventScroll: true });
    show();
  }

  function connect() {
    if (source || paused() || document.hidden) return;
    source = new EventSource(address);
    source.addEventListener("main", (event) => {
      lostAt = null;
      replace(event.data);
    });
    source.addEventListener("error", () => {
      lostAt = lostAt || clock();
      show();
      // The browser tries again unless the server has refused; then this script does.
      if (source && source.readyState === EventSource.CLOSED) {
        disconnect();
        setTimeout(connect, 5000);
      }
    });
  }

  function disconnect() {
    if (source) source.close();
    source = null;
  }

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element) || !event.target.closest("#live-button")) return;
    sessionStorage.setItem(PAUSED, paused() ? "no" : "yes");
    if (paused()) disconnect();
    else connect();
    show();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  document.addEventListener("selectionchange", () => {
    if (held && !busy() && !paused()) replace(held);
  });
  window.addEventListener("pagehide", disconnect);
  window.addEventListener("pageshow", connect);

  show();
  connect();
})();
