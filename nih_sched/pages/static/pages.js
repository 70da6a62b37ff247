// The overview's live part is fetched anew every 2 s while it is looked at; without this script it is as it was loaded.
"use strict";
const live = document.getElementById("live");
async function refresh() {
  if (document.hidden) return;
  const url = new URL(live.dataset.url, location.origin); // without a login that stands in the address
  const answer = await fetch(url, { credentials: "same-origin", redirect: "error" });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("live");
  const open = [...live.querySelectorAll("details")].map((one) => one.open);
  if (!fresh || live.contains(document.activeElement)) return;
  live.replaceChildren(...fresh.childNodes);
  live.querySelectorAll("details").forEach((one, number) => { one.open = Boolean(open[number]); });
}
if (live) setInterval(() => refresh().catch(() => {}), 2000);
