-- Tables as an older application left them. Nothing in here knows of nih-sched.

CREATE TABLE `Orders` (
    `orderId`   char(36)     NOT NULL PRIMARY KEY,
    `Customer`  varchar(80)  NOT NULL,
    `placedAt`  datetime     NOT NULL
) ENGINE=InnoDB CHARACTER SET utf8mb4;

CREATE TABLE `OrderLines` (
    `orderId`    char(36)     NOT NULL,
    `Line No`    smallint     NOT NULL,
    `Item`       varchar(80)  NOT NULL,
    `Stückzahl`  int          NOT NULL CHECK (`Stückzahl` > 0),
    `group`      varchar(10)  NOT NULL,
    `Status`     tinyint      NOT NULL CHECK (`Status` IN (0, 1, 2, 9)),  -- new, in work, done, error
    `changedAt`  datetime(6)  NOT NULL,
    PRIMARY KEY (`orderId`, `Line No`),
    CONSTRAINT `orderOfLine` FOREIGN KEY (`orderId`) REFERENCES `Orders` (`orderId`) ON DELETE CASCADE
) ENGINE=InnoDB CHARACTER SET utf8mb4;

CREATE TABLE `StatusAudit` (
    `auditId`  bigint       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    `orderId`  char(36)     NOT NULL,
    `Line No`  smallint     NOT NULL,
    `from`     tinyint      NOT NULL,
    `to`       tinyint      NOT NULL,
    `at`       datetime(6)  NOT NULL
) ENGINE=InnoDB CHARACTER SET utf8mb4;

CREATE TRIGGER `stampLine` BEFORE UPDATE ON `OrderLines` FOR EACH ROW SET NEW.`changedAt` = utc_timestamp(6);

CREATE TRIGGER `auditLine` AFTER UPDATE ON `OrderLines` FOR EACH ROW
    INSERT INTO `StatusAudit` (`orderId`, `Line No`, `from`, `to`, `at`)
    VALUES (OLD.`orderId`, OLD.`Line No`, OLD.`Status`, NEW.`Status`, NEW.`changedAt`);

INSERT INTO `Orders` VALUES
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 'Brontë & Söhne', '2009-03-01 08:00:00'),
    ('00000000-0000-4000-8000-0000000000aa', '100% "Café"',    '2009-03-02 09:30:00');

-- Forty plain lines.
INSERT INTO `OrderLines`
SELECT `orderId`, seq, concat('book ', seq), seq, CASE seq % 2 WHEN 0 THEN 'letter' ELSE 'parcel' END, 0, `placedAt`
FROM `Orders`, seq_1_to_20;

-- Lines that fail, and lines in other states.
INSERT INTO `OrderLines` VALUES
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 101, 'carrier is busy',      1, 'parcel', 0, '2009-03-01 08:00:00'),
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 102, 'always out of stock',  1, 'letter', 0, '2009-03-01 08:00:00'),
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 103, 'no longer made',       1, 'parcel', 0, '2009-03-01 08:00:00'),
    ('7c9e6679-7425-40de-944b-e07fc1f90ae7', 104, '50% :off \\ ''Öl'' ☕', 1, 'pickup', 0, '2009-03-01 08:00:00'),
    ('00000000-0000-4000-8000-0000000000aa', 201, 'by hand just now',     1, 'parcel', 1, '2009-03-01 08:00:00'),
    ('00000000-0000-4000-8000-0000000000aa', 202, 'sent long ago',        1, 'parcel', 2, '2009-03-01 08:00:00'),
    ('00000000-0000-4000-8000-0000000000aa', 203, 'given up long ago',    1, 'letter', 9, '2009-03-01 08:00:00');

INSERT INTO `StatusAudit` (`orderId`, `Line No`, `from`, `to`, `at`)
VALUES ('00000000-0000-4000-8000-0000000000aa', 202, 1, 2, '2009-03-05 08:00:00');
