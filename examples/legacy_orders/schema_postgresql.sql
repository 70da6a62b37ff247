-- Tables as an older application left them. Nothing in here knows of nih-sched.

CREATE TABLE "Orders" (
    "orderId"   uuid         PRIMARY KEY,
    "Customer"  varchar(80)  NOT NULL,
    "placedAt"  timestamptz  NOT NULL
);

CREATE TABLE "OrderLines" (
    "orderId"    uuid         NOT NULL REFERENCES "Orders" ON DELETE CASCADE,
    "Line No"    smallint     NOT NULL,
    "Item"       varchar(80)  NOT NULL,
    "Stückzahl"  integer      NOT NULL CHECK ("Stückzahl" > 0),
    "group"      varchar(10)  NOT NULL,
    "Status"     smallint     NOT NULL CHECK ("Status" IN (0, 1, 2, 9)),  -- new, in work, done, error
    "changedAt"  timestamptz  NOT NULL,
    PRIMARY KEY ("orderId", "Line No")
);

CREATE TABLE "StatusAudit" (
    "auditId"  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    "orderId"  uuid         NOT NULL,
    "Line No"  smallint     NOT NULL,
    "from"     smallint     NOT NULL,
    "to"       smallint     NOT NULL,
    "at"       timestamptz  NOT NULL
);

CREATE FUNCTION stamp_line() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW."changedAt" := clock_timestamp();
    RETURN NEW;
END $$;

CREATE FUNCTION audit_line() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO "StatusAudit" ("orderId", "Line No", "from", "to", "at")
    VALUES (OLD."orderId", OLD."Line No", OLD."Status", NEW."Status", NEW."changedAt");
    RETURN NULL;
END $$;

CREATE TRIGGER "stampLine" BEFORE UPDATE ON "OrderLines" FOR EACH ROW EXECUTE FUNCTION stamp_line();

CREATE TRIGGER "auditLine" AFTER UPDATE ON "OrderLines" FOR EACH ROW EXECUTE FUNCTION audit_line();

INSERT INTO "Orders" VALUES
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 'Brontë & Söhne', '2009-03-01 08:00:00+00'),
    ('00000000-0000-4000-8000-0000000000aa', '100% "Café"',    '2009-03-02 09:30:00+00');

-- Forty plain lines.
INSERT INTO "OrderLines"
SELECT "orderId", n, 'book ' || n, n, CASE n % 2 WHEN 0 THEN 'letter' ELSE 'parcel' END, 0, "placedAt"
FROM "Orders", generate_series(1, 20) AS n;

-- Lines that fail, and lines in other states.
INSERT INTO "OrderLines" VALUES
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 101, 'carrier is busy',     1, 'parcel', 0, '2009-03-01 08:00:00+00'),
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 102, 'always out of stock', 1, 'letter', 0, '2009-03-01 08:00:00+00'),
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 103, 'no longer made',      1, 'parcel', 0, '2009-03-01 08:00:00+00'),
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 104, '50% :off \ ''Öl'' ☕', 1, 'pickup', 0, '2009-03-01 08:00:00+00'),
    ('00000000-0000-4000-8000-0000000000aa', 201, 'by hand just now',    1, 'parcel', 1, '2009-03-01 08:00:00+00'),
    ('00000000-0000-4000-8000-0000000000aa', 202, 'sent long ago',       1, 'parcel', 2, '2009-03-01 08:00:00+00'),
    ('00000000-0000-4000-8000-0000000000aa', 203, 'given up long ago',   1, 'letter', 9, '2009-03-01 08:00:00+00');

INSERT INTO "StatusAudit" ("orderId", "Line No", "from", "to", "at")
VALUES ('00000000-0000-4000-8000-0000000000aa', 202, 1, 2, '2009-03-05 08:00:00+00');
