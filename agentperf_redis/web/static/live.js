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
  let held = null; // the content that arrived while the user was selecting text or filling in a form

  let stopped = stored();
  const clock = () => new Date().toISOString().slice(11, 19) + " UTC";

  // The choice holds for all pages of this tab. A browser may forbid storage; then it holds for one page.
  function stored() {
    try {
      return sessionStorage.getItem(PAUSED) === "yes";
    } catch {
      return false;
    }
  }

  function store() {
    try {
      sessionStorage.setItem(PAUSED, stopped ? "yes" : "no");
    } catch {}
  }

  function show() {
    const state = document.getElementById("live-state");
    const button = document.getElementById("live-button");
    if (button) {
      button.hidden = false;
      button.textContent = stopped ? "Resume" : "Pause";
      button.setAttribute("aria-label", stopped ? "Resume live updates" : "Pause live updates");
    }
    const news = stopped
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
    const typing = active && main.contains(active) && active.matches("select, form:not([data-keep]) input");
    const selection = document.getSelection();
    const selecting = selection && !selection.isCollapsed && main.contains(selection.anchorNode);
    return Boolean(typing || selecting || main.querySelector("button:active"));
  }

  // Returns how an element can be found in the next content: by its id, or by its kind, text and place.
  function findAgain(element) {
    if (element.id) return () => document.getElementById(element.id);
    const names = ["href", "aria-label", "aria-labelledby"];
    const looks = (each) => [...names.map((name) => each.getAttribute(name)), each.matches(".scroll") || each.textContent].join();
    const wanted = looks(element);
    const same = () => [...main.querySelectorAll(element.tagName)].filter((each) => looks(each) === wanted);
    const place = same().indexOf(element);
    return () => same()[place] || null;
  }

  // Replaces the children of <main>. A form for a filter stays where it is, with its text, its focus and its cursor.
  function swap(content) {
    const forms = new Map([...main.children].filter((each) => each.matches("form[data-keep]")).map((each) => [each.id, each]));
    for (const node of [...main.childNodes]) if (!forms.has(node.id)) node.remove();
    let next = main.firstChild;
    for (const node of [...content.childNodes]) {
      const form = forms.get(node.id);
      if (form) {
        next = form.nextSibling;
        forms.delete(node.id);
      } else main.insertBefore(node, next);
    }
    forms.forEach((form) => form.remove());
  }

  function replace(html) {
    if (busy()) {
      held = html;
      return;
    }
    held = null;
    const next = new DOMParser().parseFromString(html, "text/html");
    const content = next.getElementById("main") || next.body;
    const active = document.activeElement;
    const refocus = main.contains(active) && !active.closest("form[data-keep]") ? findAgain(active) : null;
    const ticked = [...main.querySelectorAll("input:checked")].map(findAgain);
    const open = [...main.querySelectorAll("details[open][id]")].map((each) => each.id);
    const scrolled = [...main.querySelectorAll(".scroll")].map((each) => [each.scrollLeft, each.scrollTop]);
    swap(content);
    for (const id of open) {
      const details = document.getElementById(id);
      if (details) details.open = true;
    }
    main.querySelectorAll(".scroll").forEach((each, number) => {
      if (scrolled[number]) [each.scrollLeft, each.scrollTop] = scrolled[number];
    });
    for (const find of ticked) {
      const box = find();
      if (box) box.checked = true;
    }
    const again = refocus && refocus();
    if (again) again.focus({ preventScroll: true });
    show();
  }

  function connect() {
    if (source || stopped || document.hidden) return;
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
        afterRefusal();
      }
    });
  }

  // An EventSource does not say why it was refused. If the login has ended, its address answers 401, also without a
  // page. Then loading this page again leads to the login, and from there back to it.
  async function afterRefusal() {
    try {
      const reply = await fetch(address.split("?")[0]);
      if (reply.status === 401) {
        location.reload();
        return;
      }
    } catch {}
    setTimeout(connect, 5000);
  }

  function disconnect() {
    if (source) source.close();
    source = null;
  }

  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element) || !event.target.closest("#live-button")) return;
    stopped = !stopped;
    store();
    if (stopped) disconnect();
    else connect();
    show();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  document.addEventListener("selectionchange", () => {
    if (held && !busy() && !stopped) replace(held);
  });
  window.addEventListener("pagehide", disconnect);
  window.addEventListener("pageshow", connect);

  show();
  connect();
})();
