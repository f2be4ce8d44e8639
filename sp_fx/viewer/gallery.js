/* The page of a batch job: filters, a grid of cards, a dialog. Its state is in the address's hash, so that what is shown can be
   linked and the back button works. */
"use strict";

(() => {
  const { element, named, isolated, percent } = viewer;
  const PIECE = 60; // cards that are made at once: whole rows of one to six
  const BINS = 25; // of the histogram
  const WAIT = 300; // milliseconds from the last keystroke to the address: browsers refuse more than a few changes a second
  const $ = (id) => document.getElementById(id);

  // Bytes of names that are no UTF-8 came as lone surrogates, which no address can hold.
  const whole = (key, value) => (typeof value === "string" ? value.replace(/[\ud800-\udfff]/gu, "\ufffd") : value);
  const { entries, unit } = JSON.parse($("data").textContent, whole);
  const byName = new Map(entries.map((entry) => [entry.name, entry]));
  const filters = $("filters");
  const field = filters.elements;
  const dialog = $("dialog");

  // -- order and filters

  const collator = new Intl.Collator("en", { numeric: true });
  const ordered = [...entries].sort((a, b) => collator.compare(a.name, b.name));
  ordered.forEach((entry, place) => { entry.place = place; entry.searched = entry.name.normalize().toLowerCase(); });
  const ORDERS = {
    name: (a, b) => a.place - b.place,
    "confidence-down": (a, b) => b.confidence - a.confidence || a.place - b.place,
    "confidence-up": (a, b) => a.confidence - b.confidence || a.place - b.place,
    class: (a, b) => collator.compare(a.label, b.label) || a.index - b.index || b.confidence - a.confidence || a.place - b.place,
  };
  const NEUTRAL = { class: "", q: "", from: 0, to: 100, sort: "name" };
  let state = { ...NEUTRAL, picture: null };

  function classOptions() {
    const classes = new Map();
    for (const { index, label } of entries) {
      if (!classes.has(index)) classes.set(index, { index, label, count: 0 });
      classes.get(index).count += 1;
    }
    const sorted = [...classes.values()].sort((a, b) => b.count - a.count || collator.compare(a.label, b.label));
    const labels = sorted.map((c) => c.label);
    return sorted.map(({ index, label, count }) => {
      const shared = labels.indexOf(label) !== labels.lastIndexOf(label); // ImageNet has two cranes
      return element("option", { value: index }, isolated(label) + (shared ? " [" + index + "]" : "") + " (" + count + ")");
    });
  }

  function matching() {
    const { from, to, sort } = state;
    const words = state.q.normalize().toLowerCase().trim();
    return ordered.filter((entry) =>
      (state.class === "" || String(entry.index) === state.class) &&
      (from === 0 || 100 * entry.confidence >= from) &&
      (to === 100 || 100 * entry.confidence <= to) &&
      entry.searched.includes(words)).sort(ORDERS[sort]);
  }

  // -- the address

  function hash() {
    const parts = Object.keys(NEUTRAL).filter((key) => state[key] !== NEUTRAL[key]).map((key) => [key, state[key]]);
    if (state.picture !== null) parts.push(["picture", state.picture]);
    return new URLSearchParams(parts).toString();
  }

  function stateOfHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const bound = (key) => {
      const value = given.has(key) ? Number(given.get(key)) : NaN;
      return Number.isFinite(value) ? Math.min(Math.max(Math.round(value), 0), 100) : NEUTRAL[key];
    };
    const [from, to] = [bound("from"), bound("to")].sort((a, b) => a - b);
    const index = given.get("class");
    return {
      class: entries.some((entry) => String(entry.index) === index) ? index : "",
      q: given.get("q") ?? "",
      from,
      to,
      sort: given.get("sort") in ORDERS ? given.get("sort") : "name",
      picture: byName.has(given.get("picture")) ? given.get("picture") : null,
    };
  }

  let waiting = null; // the timer of a change that is not in the address yet

  function replaceAddress() {
    clearTimeout(waiting);
    waiting = null;
    history.replaceState(history.state, "", "#" + hash());
  }
  function replaceAddressSoon() {
    clearTimeout(waiting);
    waiting = setTimeout(replaceAddress, WAIT);
  }
  function pushAddress(about = null) {
    clearTimeout(waiting);
    waiting = null;
    history.pushState(about, "", "#" + hash());
  }

  // -- the grid

  let matched = []; // the entries that the filters let through, in order
  let made = 0; // how many of them have cards

  function card(entry) {
    const size = 160;
    const button = element("button", { type: "button", "aria-haspopup": "dialog" },
      element("span", { className: "card-class", dir: "auto" }, named(entry.label)), " ",
      element("span", { className: "card-number" }, percent(entry.confidence)), " ",
      element("span", { className: "card-name", dir: "auto" }, named(entry.name)));
    if (entry.target !== entry.label) {
      button.append(" ", element("span", { className: "card-note" }, "map of " + isolated(entry.target)));
    }
    button.addEventListener("click", () => openPicture(entry));
    return element("div", { className: "card", role: "listitem", title: entry.name },
      element("div", { className: "pair" }, viewer.picture(entry, { size, lazy: true }), viewer.map(entry, { size, lazy: true })),
      button, viewer.bar(entry.confidence));
  }

  /* Pieces have grids of their own, so that thousands of cards out of sight cost no layout. */
  function makePiece() {
    const piece = matched.slice(made, made + PIECE);
    $("cards").append(element("div", { className: "piece", role: "presentation" }, ...piece.map(card)));
    made += piece.length;
    const left = matched.length - made;
    $("more").hidden = left === 0;
    $("more").querySelector("span").textContent = left.toLocaleString("en") + " more";
    // Observing anew reports anew, also where the end is still in sight.
    nearEnd?.unobserve($("more"));
    if (left) nearEnd?.observe($("more"));
  }

  function focusCard(place) {
    while (place >= made) makePiece();
    $("cards").children[Math.floor(place / PIECE)].children[place % PIECE].querySelector("button").focus();
  }

  const nearEnd = "IntersectionObserver" in window
    ? new IntersectionObserver((seen) => seen.some((s) => s.isIntersecting) && makePiece(), { rootMargin: "1200px" })
    : null;

  function showMatching() {
    const top = $("results").getBoundingClientRect().top;
    matched = matching();
    made = 0;
    $("cards").replaceChildren();
    makePiece();
    const all = entries.length.toLocaleString("en") + (entries.length === 1 ? " picture" : " pictures");
    $("count").textContent = matched.length.toLocaleString("en") + " of " + all;
    $("nothing").hidden = matched.length > 0;
    $("reset").hidden = Object.keys(NEUTRAL).every((key) => state[key] === NEUTRAL[key]);
    if (top < 0) $("results").scrollIntoView({ block: "start" });
  }

  // -- the filters' fields

  function fillFields() {
    for (const key of Object.keys(NEUTRAL)) {
      if (field[key].value !== String(state[key])) field[key].value = state[key];
    }
    $("range").value = state.from === 0 && state.to === 100 ? "any" : state.from + "\u2013" + state.to + "%";
    for (const key of ["from", "to"]) field[key].setAttribute("aria-valuetext", state[key] + "%");
    // Both at the right end: the lower one must be on top, or neither could be moved.
    field.from.classList.toggle("upper", state.from > 50);
    const between = field.from.parentElement;
    between.style.setProperty("--from", state.from / 100);
    between.style.setProperty("--to", state.to / 100);
    [...$("histogram").children].forEach((bin, i) => {
      const middle = (100 * (i + 0.5)) / BINS;
      bin.classList.toggle("outside", middle < state.from || middle > state.to);
    });
  }

  function makeHistogram() {
    const counts = new Array(BINS).fill(0);
    for (const { confidence } of entries) counts[Math.min(Math.max(Math.floor(confidence * BINS), 0), BINS - 1)] += 1;
    const most = Math.max(...counts, 1);
    $("histogram").append(...counts.map((count) => {
      const bin = element("span");
      bin.style.setProperty("--part", Math.sqrt(count / most)); // by the root, or the few of low confidence would not be seen
      return bin;
    }));
  }

  let lastField = null; // the one that is being typed in or slid: all of that is one step of the history
  let frame = null;

  function changed(event) {
    const { name, value } = event.target;
    const before = JSON.stringify(state);
    if (name === "from") state.from = Math.min(Number(value), state.to);
    else if (name === "to") state.to = Math.max(Number(value), state.from);
    else state[name] = value;
    fillFields();
    if (JSON.stringify(state) === before) return;
    const continuous = name !== "class" && name !== "sort";
    if (continuous && lastField === name) replaceAddressSoon();
    else {
      if (waiting !== null) replaceAddressBefore(before);
      pushAddress();
    }
    lastField = continuous ? name : null;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(showMatching);
  }

  function replaceAddressBefore(before) {
    const now = state;
    state = JSON.parse(before);
    replaceAddress();
    state = now;
  }

  function reset() {
    if (waiting !== null) replaceAddress();
    Object.assign(state, NEUTRAL);
    lastField = null;
    pushAddress();
    fillFields();
    showMatching();
  }

  // -- the dialog

  const panel = viewer.explanation(unit);
  let shown = null; // the entry that the dialog shows, or showed last

  function openPicture(entry) {
    if (waiting !== null) replaceAddress();
    state.picture = entry.name;
    pushAddress({ opened: true });
    showDialog();
  }

  function showDialog() {
    shown = byName.get(state.picture);
    const place = matched.indexOf(shown);
    $("dialog-name").textContent = named(shown.name);
    $("dialog-place").textContent = place < 0
      ? "not among the filtered pictures"
      : (place + 1).toLocaleString("en") + " of " + matched.length.toLocaleString("en");
    for (const [id, step] of [["previous", -1], ["next", 1]]) {
      const neighbour = place < 0 ? undefined : matched[place + step];
      $(id).setAttribute("aria-disabled", String(!neighbour)); // not disabled, which would lose the focus
      if (neighbour) for (const src of [neighbour.picture, neighbour.map, neighbour.product]) if (src) new Image().src = src;
    }
    panel.show(shown);
    if (!dialog.open) dialog.showModal();
  }

  function step(by) {
    const neighbour = matched[matched.indexOf(shown) + by];
    if (!matched.includes(shown) || !neighbour) return;
    state.picture = neighbour.name;
    replaceAddressSoon();
    showDialog();
    dialog.scrollTop = 0;
  }

  function closed() {
    if (state.picture !== null) {
      state.picture = null;
      clearTimeout(waiting);
      waiting = null;
      if (history.state?.opened) history.back();
      else replaceAddress();
    }
    const place = matched.indexOf(shown);
    if (place >= 0) focusCard(place);
  }

  // -- begin

  function goToHash() {
    const filtersBefore = JSON.stringify({ ...state, picture: null });
    clearTimeout(waiting);
    waiting = null;
    lastField = null;
    state = stateOfHash();
    fillFields();
    if (JSON.stringify({ ...state, picture: null }) !== filtersBefore) showMatching();
    if (state.picture !== null) showDialog();
    else if (dialog.open) dialog.close();
  }

  function listen() {
    filters.addEventListener("input", changed);
    filters.addEventListener("submit", (event) => event.preventDefault());
    filters.addEventListener("reset", (event) => { event.preventDefault(); reset(); field.q.focus(); });
    $("nothing").querySelector("button").addEventListener("click", () => { reset(); field.q.focus(); });
    $("more").querySelector("button").addEventListener("click", () => {
      const first = made;
      focusCard(first);
    });
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    $("close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", closed);
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // beside its body
    dialog.addEventListener("keydown", (event) => {
      if (event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) { event.preventDefault(); step(by); }
    });
    window.addEventListener("hashchange", goToHash);
    window.addEventListener("beforeprint", () => {
      for (const image of document.querySelectorAll("img[loading=lazy]")) image.loading = "eager";
    });
  }

  history.scrollRestoration = "manual"; // the cards to go back to may not be made yet
  field.class.append(...classOptions());
  makeHistogram();
  $("dialog-explanation").append(panel.root);
  const [nothing, advice] = $("nothing").querySelectorAll("p");
  nothing.textContent = entries.length ? "No picture matches these filters." : "No picture was explained.";
  advice.textContent = entries.length ? "Try a wider range of confidence, another class or a shorter part of a name." : "";
  filters.hidden = $("nothing").querySelector("button").hidden = entries.length === 0;
  listen();
  state = stateOfHash();
  fillFields();
  $("main").hidden = false;
  showMatching();
  if (state.picture !== null) showDialog();
})();
