// The live part of a page is fetched anew every 2 s while it is looked at; without this script it is as it was loaded.
"use strict";
const live = document.getElementById("live");
let last = live && live.innerHTML;
const summary = (id) => document.getElementById(id)?.querySelector("summary");
function isInUse() {
  const selected = getSelection(), focused = document.activeElement;
  const reads = selected && !selected.isCollapsed && live.contains(selected.anchorNode);
  return reads || (live.contains(focused) && !focused.matches("details[id] > summary"));
}
async function refresh() {
  if (document.hidden) return;
  const url = new URL(live.dataset.url, location.origin); // without a login that stands in the address
  const answer = await fetch(url, { credentials: "same-origin", redirect: "error" });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("live");
  if (!fresh || fresh.innerHTML === last || isInUse()) return;
  last = fresh.innerHTML;
  const was = new Map([...live.querySelectorAll("details[id]")].map((one) => [one.id, one]));
  for (const one of fresh.querySelectorAll("details[id]")) {
    if (was.has(one.id)) one.open = was.get(one.id).open;
  }
  const focused = live.contains(document.activeElement) && document.activeElement.parentElement.id;
  live.replaceChildren(...fresh.childNodes);
  if (focused) summary(focused)?.focus({ preventScroll: true });
}
if (live) setInterval(() => refresh().catch(() => {}), 2000);
